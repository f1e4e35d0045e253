"""What no cache can hold, whatever a file says. A checksum is no signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import geometry
from kvpress.policy.budget import UNLIMITED
from kvpress.store.base import POSITION
from kvpress.types import EMPTY

ALIKE = ("columns_seen", "prompted_at", "padded_at")  # in all layers


def check_counters(layer: Layer) -> None:
    """Raises CacheError unless sequences can have seen and decoded so many tokens."""
    own, columns, decoded_B = layer.sequences, layer.columns_seen, layer.sequences.decoded.tokens_B
    seen_B = own.seen_B
    if bool((seen_B > columns).any()) or (not layer.padded_at and bool((seen_B < columns).any())):
        raise CacheError(f"Of {columns} columns {seen_B.tolist()} are tokens.")
    if bool((decoded_B > seen_B).any()):
        raise CacheError(f"Of {seen_B.tolist()} tokens {decoded_B.tolist()} were decoded.")
    uses = {"demand_B": layer.recipe.shares, "threshold_B": layer.recipe.merging is not None}
    for name, used in uses.items():
        if not used and not bool(getattr(own, name).isnan().all()):
            given = getattr(own, name).tolist()
            raise CacheError(f"{name} is {given}, but {layer.recipe} has none.")
    sink = layer.limits.sink if layer.limits else 0
    if bool((own.sink_B < sink).any()) or bool((own.guarded_B < own.sink_B.cpu()).any()):
        raise CacheError(f"{layer.recipe} protects {sink} first tokens, not {own.sink_B.tolist()}.")
    least_B = [int(own.sink_B[b]) + own.spans.count(b, 2**31) for b in range(len(own))]
    if bool((own.guarded_B > host.tensor(least_B)).any()):
        raise CacheError(f"{own.guarded_B.tolist()} tokens cannot be protected.")
    portion_R = own.portion_R
    if not bool((portion_R > 0).all() if layer.recipe.uneven else (portion_R == 1).all()):
        raise CacheError(f"Rows cannot get {portion_R.tolist()} of a budget.")
    if bool((own.looked_B > (0 if layer.recipe.gathers else seen_B)).any()):
        raise CacheError(f"{own.looked_B.tolist()} tokens cannot have been looked at twice.")


def check_slots(layer: Layer) -> None:
    """Raises CacheError unless rows can hold slots of these positions, and mass."""
    rows, seen_B = layer.rows, layer.sequences.seen_B
    position_BHS = rows.dense(POSITION).cpu().long()
    held_BHS = position_BHS != EMPTY
    if bool(((position_BHS < 0) & held_BHS).any()) or bool(
        (position_BHS >= seen_B[:, None, None]).any()
    ):
        raise CacheError(f"Layer {layer.kind.index} holds tokens that were never seen.")
    ordered = position_BHS.sort(dim=-1).values
    twice = (ordered.diff(dim=-1) == 0) & (ordered[:, :, 1:] != EMPTY)
    if bool(twice.any()):
        raise CacheError(f"Layer {layer.kind.index} holds tokens twice.")
    if not _unlost(layer, position_BHS):
        raise CacheError(f"Layer {layer.kind.index} lost tokens that it never evicted.")


def _unlost(layer: Layer, position_BHS: Tensor) -> bool:
    """Whether rows hold all tokens that came after an eviction or were protected from it."""
    limits, seen_B1 = layer.limits, layer.sequences.seen_B[:, None]
    if limits is None or layer.evicted_at == 0:
        return bool((layer.rows.counts_BH == seen_B1).all())
    newest = layer.columns_seen - layer.evicted_at if layer.padded_at <= layer.evicted_at else 0
    recent_BH = layer.sequences.recent_BH
    if limits.recent is None:
        recent_BH = torch.zeros_like(recent_BH)  # a share grows
    last_BH = torch.minimum(recent_BH + newest, seen_B1)
    held_BH = (position_BHS >= (seen_B1 - last_BH)[..., None]).sum(-1)
    sink_B1 = layer.sequences.sink_B[:, None]
    sinks_BH = ((position_BHS >= 0) & (position_BHS < sink_B1[..., None])).sum(-1)
    return bool((held_BH == last_BH).all()) and bool((sinks_BH == seen_B1.minimum(sink_B1)).all())


def check_quotas(layer: Layer) -> None:
    """Raises CacheError unless the budget can have given these quotas."""
    limits, quota_BH, counts_BH = layer.limits, layer.sequences.quota_BH, layer.rows.counts_BH
    index, seen_B, recent_R = layer.kind.index, layer.sequences.seen_B, layer.sequences.recent_R
    if limits is None:
        if bool((quota_BH != UNLIMITED).any()) or bool(recent_R.any()):
            raise CacheError(f"Layer {index} has quotas, but {layer.recipe} has no budget.")
        return
    tokens = max(1, layer.prompted_at, layer.columns_seen)
    budget = limits.quota(tokens, geometry(layer))
    most = min(budget.slots * layer.kind.heads * max(1, layer.context.compressed), UNLIMITED)
    if bool(((quota_BH < 1) | ((quota_BH > most) & (quota_BH != UNLIMITED))).any()):
        raise CacheError(f"Layer {index} has quotas of {quota_BH.tolist()} slots.")
    # A fraction grows with the text: then rows may hold less than a later quota allows.
    least_BH = quota_BH.minimum(seen_B[:, None])
    if limits.budget.relative:
        least_BH = least_BH.masked_fill(quota_BH <= seen_B[:, None], 0)
    if not layer.recipe.shares and bool((counts_BH < least_BH).any()):
        raise CacheError(f"Rows of layer {index} lost tokens within their quotas.")
    if limits.interval and bool((counts_BH > quota_BH + limits.interval).any()):
        raise CacheError(f"Rows of layer {index} hold {counts_BH.tolist()} slots above quota.")
    odd_R = recent_R > most
    if limits.recent is not None:
        odd_R = (recent_R != 0) & (recent_R != limits.recent)
    if bool(odd_R.any()):
        raise CacheError(f"Layer {index} protects {recent_R.tolist()} recent tokens.")


def check_alike(layers: Sequence[Layer], layer: Layer) -> None:
    """Raises CacheError unless it has seen the same tokens as the layers before it."""
    first, own = layers[0].sequences, layer.sequences
    same = {name: (getattr(layers[0], name), getattr(layer, name)) for name in ALIKE}
    same["seen_B"] = (first.seen_B.tolist(), own.seen_B.tolist())
    same["decoded_B"] = (first.decoded.tokens_B.tolist(), own.decoded.tokens_B.tolist())
    for name, (one, two) in same.items():
        if one != two:
            raise CacheError(f"Layers differ in {name}: {one} and {two}.")
    for other in layers[: layers.index(layer)]:
        shapes = [(x.kind.heads, x.key_width, x.value_width) for x in (other, layer) if x.store]
        if len(shapes) == 2 and shapes[0][:2] == shapes[1][:2] and shapes[0] != shapes[1]:
            raise CacheError(f"Layers differ in (KV heads, key and value width): {shapes}.")


def check_whole(name: str, number: Any, least: int, most: int) -> None:
    if type(number) is not int or not least <= number <= most:
        raise CacheError(f"{name}={number!r} is no whole number from {least} to {most}.")
