"""`attend_sums` on a GPU: PyTorch's fused attention, then the Triton kernels of `attention_sums`.

Matrix units make a second pass over the logits cheap there, while one kernel for both would have to
keep the exponentials of all slots until the normalisers are known.
"""

from __future__ import annotations

from kvpress.csrc.attend_blocks.triton_kernel import attend_blocks
from kvpress.csrc.attend_sums import Operands
from kvpress.csrc.attend_sums.reference import attend, check, of_sums
from kvpress.csrc.attention_sums.triton_kernel import attention_sums
from torch import Tensor


def attend_sums(operands: Operands) -> tuple[Tensor, Tensor]:
    """The same as the reference. Raises OperatorError."""
    check(operands)
    return attend(operands, attend_blocks), attention_sums(of_sums(operands))
