"""Which blocks of a prompt's attention one layer computes, as a picture: one panel per head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from kvpress.bench.calibrate.thresholds import thresholds_of
from kvpress.bench.calibrate.watch import Given, watching
from kvpress.bench.common.figures import figure_of
from torch import Tensor

import kvpress
from kvpress.errors import KVPressError
from kvpress.formulas.block_map import Blocks, from_map
from kvpress.pipe.stages.sparsify import block_map


class MapError(KVPressError, ValueError):
    """A map that cannot be drawn as it was asked for."""


def computed_of(model: Any, ids_1T: Tensor, policy: str, layer: int) -> Tensor:
    """Which blocks a layer computes for a prompt: bool `[N, I, J]`. Raises MapError, PolicyError.

    The prompt is read with the policy, so that the layer gets what it gets in use.
    """
    limits = thresholds_of(model, policy)
    tokens, layers = ids_1T.shape[1], len(limits.tau_LN)
    if not 0 <= layer < layers:
        raise MapError(f"--layer {layer} does not exist: allowed are 0 to {layers - 1}.")
    if tokens < limits.least:
        raise MapError(
            f"The prompt has {tokens:,} tokens, and those of fewer than {limits.least:,} are"
            " attended in full. Give a longer one (--prompt-tokens), or the option least=1."
        )
    found: list[Tensor] = []

    def see(given: Given, _: Tensor) -> None:
        if len(found) == layer:
            tau_N = limits.tau_LN[layer]
            found.append(
                block_map(given.query_BNQD, given.key_BHQD, given.scaling, tau_N, limits.local)
            )
        elif len(found) < layer:
            found.append(torch.empty(0))

    with kvpress.attach(model, policy) as engine, torch.inference_mode(), watching(see):
        model(ids_1T, cache=engine.new_cache(), logits_to_keep=1)
    return from_map(found[layer], Blocks(tokens, tokens))[0]


def draw(computed_NIJ: Tensor, blocks: Blocks, title: str, path: Path) -> None:
    """Writes the picture; computed blocks are dark. Raises PlotError without matplotlib."""
    heads = len(computed_NIJ)
    figure, axes = figure_of(heads)
    seen_IJ = blocks.seen()
    for head, axis in enumerate(axes[:heads]):
        shade_IJ = torch.where(seen_IJ, 1.0 - 0.75 * computed_NIJ[head].float().cpu(), 0.92)
        axis.imshow(
            shade_IJ.numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
        )
        share = float(computed_NIJ[head].sum()) / blocks.causal
        axis.set_title(f"head {head}: {share:.0%}", fontsize=9)
        axis.set_xlabel("blocks of 32 slots", fontsize=8)
        axis.set_ylabel("blocks of 64 queries", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path)
