"""`attend_sums` on a GPU: PyTorch's fused attention, then the Triton kernels of `attention_sums`.

Matrix units make a second pass over the logits cheap there, while one kernel for both would have to
keep the exponentials of all slots until the normalisers are known.
"""

from __future__ import annotations

from kvpress.csrc.attend_blocks.triton_kernel import attend_blocks
from kvpress.csrc.attend_sums.reference import check
from kvpress.csrc.attention_sums.triton_kernel import attention_sums
from torch import Tensor

from kvpress.formulas.attention import prompt_attention


def attend_sums(
    query_BNPD: Tensor,
    key_BHSD: Tensor,
    value_BHSE: Tensor,
    position_BHS: Tensor,
    scaling: float,
    softcap: float,
    noise: str,
    tau: float,
    seed: int,
    layer: int,
    map_BNX: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as the reference. Raises OperatorError."""
    choices = (scaling, softcap, noise, tau, map_BNX)
    check(query_BNPD, key_BHSD, value_BHSE, position_BHS, *choices)
    if map_BNX is None:
        out_BNPE = prompt_attention(query_BNPD, key_BHSD, value_BHSE, None, scaling, softcap)
    else:
        out_BNPE, _ = attend_blocks(query_BNPD, key_BHSD, value_BHSE, map_BNX, scaling)
    numbers = (scaling, softcap, query_BNPD.shape[2], noise, tau, seed, layer)
    return out_BNPE, attention_sums(query_BNPD, key_BHSD, position_BHS, *numbers, map_BNX)
