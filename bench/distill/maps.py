"""A target's attention to what is far back: what a head learns from, and is measured by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from kvpress.bench.calibrate.watch import Given, watching
from kvpress.bench.common.candidates import candidate
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Always:
    """What every step reads, whatever a head says: first and last tokens."""

    sink: int = 4
    recent: int = 64

    def chosen_from(self, at_A: Tensor, tokens: int) -> Tensor:
        """The tokens among which a query at a place chooses: bool `[A, T]`."""
        token_T = torch.arange(tokens, device=at_A.device)
        return (token_T >= self.sink) & (token_T <= at_A[:, None] - self.recent)


class Map(NamedTuple):
    """A context, places of queries, and the attention of layers to what is chosen from.

    mass_HAT: fp16, the mean over layers and over the query heads of a KV head; what a step always
    reads has none, so that a query's sum is how much is at stake.
    """

    id_T: Tensor
    at_A: Tensor
    mass_HAT: Tensor


def watch(
    model: Any, id_T: Tensor, at_A: Tensor, always: Always, see: Callable[[int, Tensor], None]
) -> None:
    """Lets a target read a context. see: gets every layer and its mass, fp32 `[H, A, T]`."""
    chosen_AT = always.chosen_from(at_A, len(id_T))
    layer = 0

    def look(given: Given, _: Tensor) -> None:
        nonlocal layer
        see(layer, _mass(given, at_A, chosen_AT))
        layer += 1

    full = candidate(model, "full")
    with torch.inference_mode(), watching(look):
        full.forward(id_T[None], full.new_cache())


def _mass(given: Given, at_A: Tensor, chosen_AT: Tensor) -> Tensor:
    """The attention of some queries, the mean over the query heads of a KV head."""
    query_NAD, key_HTD = given.query_BNQD[0][:, at_A].float(), given.key_BHQD[0].float()
    heads = len(key_HTD)
    token_T = torch.arange(key_HTD.shape[1], device=at_A.device)
    later_AT = token_T > at_A[:, None]
    query_HGAD, made = torch.unflatten(query_NAD, 0, (heads, -1)), []
    for query_GAD, key_TD in zip(query_HGAD, key_HTD, strict=True):
        logit_GAT = (query_GAD @ key_TD.T) * given.scaling
        weight_GAT = logit_GAT.masked_fill_(later_AT, -torch.inf).softmax(-1)
        made.append(weight_GAT.mean(0) * chosen_AT)
    return torch.stack(made)


def averaged(model: Any, ids: list[int], places: list[int], always: Always, layers: range) -> Map:
    """The map of a context, over some layers."""
    id_T = torch.tensor(ids, device=model.device)
    at_A = torch.tensor(places, device=model.device)
    total_HAT = torch.zeros(())

    def see(layer: int, mass_HAT: Tensor) -> None:
        nonlocal total_HAT
        if layer in layers:
            total_HAT = total_HAT + mass_HAT / len(layers)

    watch(model, id_T, at_A, always, see)
    return Map(id_T, at_A, total_HAT.half())
