"""PyTorch reference of `attend_sums`: its two halves one after the other."""

from __future__ import annotations

from collections.abc import Callable

from kvpress.csrc.attend_blocks import Operands as AttendBlocks
from kvpress.csrc.attend_blocks.reference import attend_blocks
from kvpress.csrc.attend_sums import Operands
from kvpress.csrc.attention_sums import Operands as AttentionSums
from kvpress.csrc.attention_sums import reference as sums
from torch import Tensor

from kvpress.formulas.attention import prompt_attention
from kvpress.ops import shapes
from kvpress.ops.operands import Reduction


def attend_sums(operands: Operands) -> tuple[Tensor, Tensor]:
    """Causal attention of a whole prompt, `[B, N, Q, E]`, and what each slot received of it.

    The sums, fp32 `[B, N, S]`, are those of `attention_sums` over all queries. Every slot holds a
    token, so that P = S. Both are of the blocks of the map, where there is one. Raises
    OperatorError.
    """
    check(operands)
    return attend(operands, attend_blocks), sums.attention_sums(of_sums(operands))


def attend(
    operands: Operands, attend_mapped: Callable[[AttendBlocks], tuple[Tensor, Tensor]]
) -> Tensor:
    """The attention alone: of everything, or of the blocks of the map."""
    query_BNQD, key_BHSD, value_BHSE, _, logits, _, map_BNX = operands
    if map_BNX is None:
        return prompt_attention(query_BNQD, key_BHSD, value_BHSE, None, *logits)
    return attend_mapped(AttendBlocks(query_BNQD, key_BHSD, value_BHSE, map_BNX, logits.scaling))[0]


def of_sums(operands: Operands) -> AttentionSums:
    """The operands of `attention_sums` over all queries."""
    query_BNQD, key_BHSD, _, position_BHS, logits, noise, map_BNX = operands
    everything = Reduction(query_BNQD.shape[2])
    return AttentionSums(query_BNQD, key_BHSD, position_BHS, logits, everything, noise, map_BNX)


def check(operands: Operands) -> None:
    """Raises OperatorError for operands that do not fit together."""
    op = "attend_sums"
    named = {name: getattr(operands, name) for name in ("query_BNQD", "key_BHSD", "value_BHSE")}
    lengths = shapes.bind(op, {**named, "position_BHS": operands.position_BHS})
    shapes.floating(op, named)
    for name, tensor in named.items():
        if tensor.dtype != operands.query_BNQD.dtype:
            wanted = operands.query_BNQD.dtype
            shapes.refuse(op, f"{name} is {tensor.dtype}; it must be {wanted}")
    shapes.at_least_one(op, lengths, "E")
    shapes.at_most(op, lengths, "E", shapes.MOST_WIDTH)
    if lengths["Q"] != lengths["S"]:
        shapes.refuse(
            op,
            f"{lengths['Q']} queries for {lengths['S']} slots; a whole prompt has as many of both."
            " Use attention_sums for a chunk",
        )
    sums.check(of_sums(operands), holes=False)
