"""PyTorch reference of `attend_blocks`."""

from __future__ import annotations

import torch
from kvpress.csrc.attend_blocks import Operands
from torch import Tensor

from kvpress.formulas.block_map import QUERIES, SLOTS, Blocks, from_map
from kvpress.ops import shapes


def attend_blocks(operands: Operands) -> tuple[Tensor, Tensor]:
    """Attention `[B, N, Q, E]` of the last Q slots' queries over the blocks of a map, and its LSE.

    LSE: the natural logarithm of the sum of the exponentials of the logits, fp32 `[B, N, Q]`.
    Values of no channels give the LSE alone. Raises OperatorError.
    """
    query_BNQD, key_BHSD, value_BHSE, map_BNX, scaling = operands
    check(operands)
    queries, slots = query_BNQD.shape[2], key_BHSD.shape[2]
    blocks = Blocks(queries, slots)
    computed_BNIJ = from_map(map_BNX, blocks)
    heads = key_BHSD.shape[1]
    outputs, normalisers = [], []
    for row in range(blocks.rows):
        own, seen = slice(row * QUERIES, (row + 1) * QUERIES), blocks.end(row) * SLOTS
        query_BHGqD = torch.unflatten(query_BNQD[:, :, own].float(), 1, (heads, -1))
        key_BH1sD, value_BH1sE = (x[:, :, None, :seen].float() for x in (key_BHSD, value_BHSE))
        computed_BNs = computed_BNIJ[:, :, row, : blocks.end(row)].repeat_interleave(SLOTS, -1)
        last_p = torch.arange(queries, device=query_BNQD.device)[own] + slots - queries
        slot_s = torch.arange(key_BH1sD.shape[3], device=last_p.device)
        visible_BNqs = computed_BNs[:, :, None, : len(slot_s)] & (slot_s <= last_p[:, None])
        logits_BHGqs = query_BHGqD @ key_BH1sD.mT * scaling
        logits_BHGqs.masked_fill_(~torch.unflatten(visible_BNqs, 1, (heads, -1)), -torch.inf)
        lse_BHGq = logits_BHGqs.logsumexp(-1)
        weights_BHGqs = (logits_BHGqs - lse_BHGq[..., None]).exp().nan_to_num(0.0)
        outputs.append((weights_BHGqs @ value_BH1sE).flatten(1, 2).to(query_BNQD.dtype))
        normalisers.append(lse_BHGq.flatten(1, 2))
    return torch.cat(outputs, dim=2), torch.cat(normalisers, dim=2)


def check(operands: Operands) -> None:
    """Raises OperatorError for operands that do not fit together."""
    op = "attend_blocks"
    query_BNQD, key_BHSD, value_BHSE, map_BNX, scaling = operands
    floats = {"query_BNQD": query_BNQD, "key_BHSD": key_BHSD, "value_BHSE": value_BHSE}
    lengths = shapes.bind(op, {**floats, "map_BNX": map_BNX})
    shapes.floating(op, floats)
    shapes.of_dtype(op, torch.uint8, {"map_BNX": map_BNX})
    shapes.prompt(op, lengths)
    shapes.at_most(op, lengths, "E", shapes.MOST_WIDTH)
    shapes.logits(op, scaling)
    bytes_of_map = Blocks(lengths["Q"], lengths["S"]).offsets[-1]
    if lengths["X"] != bytes_of_map:
        shapes.refuse(op, f"map_BNX has {lengths['X']} bytes per head; it must have {bytes_of_map}")
