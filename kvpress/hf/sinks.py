"""Learned attention sinks: which layers of a model have them, and what cannot go with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from kvpress.errors import PolicyError
from kvpress.formulas.sinks import CHANNELS
from kvpress.policy.recipe import Recipe
from kvpress.types import MOST_WIDTH, LayerKind

_NAME = "sinks"  # the attribute of an attention module that holds one logit for each query head
_MADE = "sink_proj"  # one that makes them of the hidden state, token by token


class Refused(NamedTuple):
    """Why a model with sinks is refused, and where that shows."""

    reason: str
    detail: str = ""


def with_sinks(model: Any, kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...] | Refused:
    """The layer kinds of a model, with the sinks that its modules have; or why it is refused."""
    found: dict[int | None, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, _MADE):
            return Refused("attention sinks that follow from the hidden state", f"{name}.{_MADE}")
        if isinstance(getattr(module, _NAME, None), torch.nn.Parameter):
            found[getattr(module, "layer_idx", None)] = module
    stray = sorted(map(str, found.keys() - {kind.index for kind in kinds}))
    if stray:
        return Refused("learned attention sinks of unknown layers", f"layer_idx {stray}")
    for kind in kinds:
        why = _refused(kind, model.config) if kind.index in found else None
        if why is not None:
            return why
    return tuple(_with(kind, found[kind.index]) if kind.index in found else kind for kind in kinds)


def _refused(kind: LayerKind, config: Any) -> Refused | None:
    """What a layer has that the engine does not know how to do with sinks."""
    sinks, layer = "learned attention sinks", f"layer {kind.index}"
    if kind.inline:
        return Refused(f"{sinks}, and computes attention by itself", layer)
    if getattr(config, "attn_logit_softcapping", None):
        return Refused(f"{sinks} with a cap on logits", "attn_logit_softcapping")
    if kind.width > MOST_WIDTH - CHANNELS:
        most = MOST_WIDTH - CHANNELS
        return Refused(f"{sinks} in heads of more than {most} channels", f"{layer}: {kind.width}")
    return None


def _with(kind: LayerKind, module: Any) -> LayerKind:
    """A kind with sinks. Its KV heads are what the module says, which no config may say."""
    group = getattr(module, "num_key_value_groups", None)
    heads = kind.queries // group if group and not kind.latent else kind.heads
    return replace(kind, sink=True, heads=heads)


def check_sinks(recipe: Recipe, sinks: bool) -> None:
    """Raises PolicyError for what cannot be where layers have learned sinks."""
    if recipe.sparsity is not None and sinks:
        raise PolicyError(
            f"{recipe} leaves out blocks of a prompt's attention. On a model with learned attention"
            " sinks no operator does so: what they take of each softmax is missing there. Use a"
            " policy without sparse prompts."
        )
