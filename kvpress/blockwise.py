"""Which blocks of a prompt's attention a layer computes, where its policy leaves some out."""

from __future__ import annotations

from torch import Tensor

from kvpress.blocks import Blocks, computed_blocks
from kvpress.layer import Layer
from kvpress.run import Tokens
from kvpress.sparse import Thresholds, block_map
from kvpress.types import EMPTY


def choose(
    layer: Layer, tokens: Tokens, key_bHSD: Tensor, position_bHS: Tensor, trains: bool
) -> Tensor | None:
    """The bit map of the blocks to compute, uint8 `[b, N, X]`; None for all of them.

    trains: whether gradients are recorded, which only exact attention has. The blocks are counted
    for the report, which also says why attention was computed in full.
    """
    limits = layer.run.thresholds
    if limits is None:
        return None
    why = "passes that record gradients" if trains else None
    why = why or _why_in_full(layer, tokens, position_bHS, limits)
    if why:
        layer.run.notes[f"Attention was computed in full for {why}."] = None
        return None
    tau_N = limits.tau_LN[layer.kind.index]
    map_bNX = block_map(tokens.query_bNPD, key_bHSD, tokens.scaling, tau_N, limits.local)
    blocks = Blocks(tokens.query_bNPD.shape[2], key_bHSD.shape[2])
    layer.count_blocks(computed_blocks(map_bNX), blocks.causal)
    return map_bNX


def _why_in_full(
    layer: Layer, tokens: Tokens, position_bHS: Tensor, limits: Thresholds
) -> str | None:
    """For which prompts and layers no block can be left out, if this is one of them."""
    if layer.kind.window is not None:
        return "sliding-window layers"
    if tokens.softcap:
        return "layers with a cap on their logits"
    if layer.kind.slopes is not None:
        return "layers with ALiBi"
    if limits.tau_LN.shape[1] != tokens.query_bNPD.shape[1]:
        return "layers whose number of query heads is not the model's"
    if tokens.query_bNPD.shape[2] < limits.least:
        return f"prompts of fewer than {limits.least:,} new tokens"
    if bool((position_bHS == EMPTY).any()):
        return "prompts that go on from rows of different lengths"
    return None
