"""PyTorch reference of `attend_sums`: its two halves one after the other."""

from __future__ import annotations

from kvpress.csrc.attend_blocks.reference import attend_blocks
from kvpress.csrc.attention_sums import reference as sums
from torch import Tensor

from kvpress.formulas.attention import prompt_attention
from kvpress.ops import shapes


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
    """Causal attention of a whole prompt, `[B, N, P, E]`, and what each slot received of it.

    The sums, fp32 `[B, N, S]`, are those of `attention_sums` over all queries. Every slot holds a
    token, so that P = S. Both are of the blocks of the map, where there is one. Raises
    OperatorError.
    """
    choices = (scaling, softcap, noise, tau, map_BNX)
    check(query_BNPD, key_BHSD, value_BHSE, position_BHS, *choices)
    queries = query_BNPD.shape[2]
    if map_BNX is None:
        out_BNPE = prompt_attention(query_BNPD, key_BHSD, value_BHSE, None, scaling, softcap)
    else:
        out_BNPE, _ = attend_blocks(query_BNPD, key_BHSD, value_BHSE, map_BNX, scaling)
    numbers = (scaling, softcap, queries, noise, tau, seed, layer)
    return out_BNPE, sums.attention_sums(query_BNPD, key_BHSD, position_BHS, *numbers, map_BNX)


def check(
    query_BNPD: Tensor,
    key_BHSD: Tensor,
    value_BHSE: Tensor,
    position_BHS: Tensor,
    scaling: float,
    softcap: float,
    noise: str,
    tau: float,
    map_BNX: Tensor | None = None,
) -> None:
    """Raises OperatorError for operands that do not fit together."""
    op = "attend_sums"
    named = {"query_BNPD": query_BNPD, "key_BHSD": key_BHSD, "value_BHSE": value_BHSE}
    lengths = shapes.bind(op, {**named, "position_BHS": position_BHS})
    shapes.floating(op, named)
    for name, tensor in named.items():
        if tensor.dtype != query_BNPD.dtype:
            shapes.refuse(op, f"{name} is {tensor.dtype}; it must be {query_BNPD.dtype}")
    shapes.at_least_one(op, lengths, "E")
    shapes.at_most(op, lengths, "E", shapes.MOST_WIDTH)
    if lengths["P"] != lengths["S"]:
        shapes.refuse(
            op,
            f"{lengths['P']} queries for {lengths['S']} slots; a whole prompt has as many of both."
            " Use attention_sums for a chunk",
        )
    choices = (scaling, softcap, lengths["P"], noise, tau, map_BNX)
    sums.check(query_BNPD, key_BHSD, position_BHS, *choices, holes=False)
