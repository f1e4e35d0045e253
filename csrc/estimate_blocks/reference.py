"""PyTorch reference of `estimate_blocks`."""

from __future__ import annotations

import torch
from kvpress.csrc.estimate_blocks import Operands
from torch import Tensor

from kvpress.formulas.block_map import GROUPS, MOST_CODE, QUERIES, SLOTS, Blocks, of_slots, to_map
from kvpress.ops import shapes

LOW, HIGH = -(2**15), 2**15 - 1  # between which estimates saturate


def estimate_blocks(operands: Operands) -> Tensor:
    """The map of blocks that hold a logit whose estimate is above the threshold of its query.

    query_BNQD, key_BHSD: int8 codes; scales, shift (q̄·k' / s_k) and thresholds (unscaled logits):
    fp32. The first block and the local area are always in the map. Raises OperatorError.
    """
    check(operands)
    query_BNQD, query_scale_BNQ, key_BHSD, key_scale_BHJ4 = operands[:4]
    shift_BNS, threshold_BNQ, local = operands[4:]
    batch, heads, queries, width = query_BNQD.shape
    kv_heads, slots = key_BHSD.shape[1:3]
    blocks = Blocks(queries, slots)
    cap = HIGH - MOST_CODE**2 * width - 1
    computed_BNIJ = blocks.always(local, query_BNQD.device).repeat(batch, heads, 1, 1)
    step_BHS = of_slots(key_scale_BHJ4, slots).reciprocal()
    for row in range(blocks.rows):
        end = blocks.first_local(row, local)
        own, seen = slice(row * QUERIES, (row + 1) * QUERIES), slice(SLOTS, end * SLOTS)
        if end < 2:
            continue
        inverse_BNq1 = query_scale_BNQ[:, :, own, None].reciprocal()
        query_BHGqD = torch.unflatten(query_BNQD[:, :, own].float(), 1, (kv_heads, -1))
        dot_BNqs = (query_BHGqD @ key_BHSD[:, :, None, seen].float().mT).flatten(1, 2)
        shift_BNqs = (shift_BNS[:, :, None, seen] * inverse_BNq1).round()
        shift_BNqs = shift_BNqs.nan_to_num(HIGH, HIGH, LOW).clamp(LOW, HIGH)
        estimate_BNqs = (dot_BNqs + shift_BNqs).clamp(LOW, HIGH)
        own_BHGq1 = torch.unflatten(
            (threshold_BNQ[:, :, own, None] * inverse_BNq1), 1, (kv_heads, -1)
        )
        bound_BNqs = (own_BHGq1 * step_BHS[:, :, None, None, seen]).floor().flatten(1, 2)
        never_BNq1 = threshold_BNQ[:, :, own, None] == torch.inf
        bound_BNqs = torch.where(never_BNq1, torch.inf, bound_BNqs.clamp(max=cap))
        hit_BNqs = (estimate_BNqs > bound_BNqs) | ~(bound_BNqs >= LOW)
        hit_BNj = torch.unflatten(hit_BNqs.any(2), -1, (-1, SLOTS)).any(-1)
        computed_BNIJ[:, :, row, 1:end] |= hit_BNj
    return to_map(computed_BNIJ, blocks)


def check(operands: Operands) -> None:
    """Raises OperatorError for operands that do not fit together."""
    query_BNQD, query_scale_BNQ, key_BHSD, key_scale_BHJ4 = operands[:4]
    shift_BNS, threshold_BNQ, local = operands[4:]
    op = "estimate_blocks"
    codes = {"query_BNQD": query_BNQD, "key_BHSD": key_BHSD}
    numbers = {
        "query_scale_BNQ": query_scale_BNQ,
        "key_scale_BHJ4": key_scale_BHJ4,
        "shift_BNS": shift_BNS,
        "threshold_BNQ": threshold_BNQ,
    }
    lengths = shapes.bind(op, {**codes, **numbers})
    shapes.of_dtype(op, torch.int8, codes)
    shapes.of_dtype(op, torch.float32, numbers)
    shapes.prompt(op, lengths)
    shapes.at_most(op, lengths, "D", shapes.MOST_CODED)
    blocks = Blocks(lengths["Q"], lengths["S"])
    if (lengths["J"], lengths["4"]) != (blocks.columns, GROUPS):
        shapes.refuse(op, f"key_scale_BHJ4 must hold {blocks.columns} × {GROUPS} scales per head")
    if local < 0:
        shapes.refuse(op, f"local is {local}; it must not be negative")
    for name, code in codes.items():
        if code.device.type == "cpu" and max(-int(code.min()), int(code.max())) > MOST_CODE:
            shapes.refuse(op, f"{name} holds codes beyond −{MOST_CODE} … {MOST_CODE}")
