"""Layers from what a file holds. Nothing of it is believed: a checksum is no signature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress.errors import CacheError, CacheFileError, KVPressError
from kvpress.formulas.page_layout import PageLayout
from kvpress.host import lasting
from kvpress.ops.shapes import FLOATS
from kvpress.pipe.state.context import Run
from kvpress.pipe.state.ids import PADDING, SeenIds
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.stores import geometry, layouts
from kvpress.policy.budget import UNLIMITED
from kvpress.store import PagedRows, Rows
from kvpress.store.base import KEY, POSITION, VALUE
from kvpress.store.saved import ANY, expect
from kvpress.store.sealed import Contents
from kvpress.types import EMPTY, LayerKind

NUMBERS = ("columns_seen", "evicted_at", "prompted_at", "padded_at")  # of a layer

COUNTERS = {  # of the sequences of a layer, or of its rows
    "seen_B": torch.int64,
    "decoded_B": torch.int64,
    "recent_B": torch.int64,
    "quota_R": torch.int64,
    "demand_B": torch.float64,
    "portion_B": torch.float64,
    "threshold_B": torch.float32,
}

ALIKE = ("columns_seen", "prompted_at", "padded_at", "seen_B", "decoded_B")  # in all layers

IDS = "ids"  # of the whole cache, [B, T]

WATCHED = "watched."  # before the number of a sequence

_MOST_TOKENS = 2**31 - 1  # positions are int32
_MOST_PAGE_SLOTS = 4096
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


class Restored(NamedTuple):
    """What a cache is made of."""

    run: Run
    layers: list[Layer]
    ids: SeenIds


@lasting
@torch.no_grad()
def restore(
    path: str | Path,
    contents: Contents,
    kinds: Sequence[LayerKind],
    run: Run,
    devices: Mapping[int, torch.device],
) -> Restored:
    """What was saved; what the layers share is made from `run`, which stays as it is.

    devices: where the layers of the model are; -1: any other. Raises CacheFileError for anything
    that no cache of this model and policy can hold. What can be, for instance other keys, is not
    told from what was saved. Takes the tensors out of `contents`, layer by layer.
    """
    try:
        run = _run(contents.facts.get("settings"), run)
        known = contents.facts.get("layers")
        if not isinstance(known, list) or len(known) != len(kinds):
            raise CacheError(f"It does not describe {len(kinds)} layers.")
        layers = [Layer(kind, run) for kind in kinds]
        run.members = layers
        for layer, numbers in zip(layers, known, strict=True):
            index = layer.kind.index
            _fill(layer, numbers, _take(contents, index), devices.get(index, devices[-1]))
            _check_alike(layers, layer)
        ids = _ids(contents, layers[0], devices[-1])
    except KVPressError as error:
        raise CacheFileError(
            f"{path} has a right checksum, but what is in it cannot be: {error} Nothing was loaded."
            " Save the cache again."
        ) from error
    return Restored(run, layers, ids)


def _run(settings: Any, run: Run) -> Run:
    """What the layers share, with the settings of the file."""
    wanted = {"horizon", "page_slots", "cache_dtype", "notes", "ended"}
    if not isinstance(settings, dict) or settings.keys() != wanted:
        raise CacheError(f"Its settings are not {', '.join(sorted(wanted))}.")
    dtype, notes = settings["cache_dtype"], settings["notes"]
    if dtype is not None and not (isinstance(dtype, str) and dtype in _DTYPES):
        raise CacheError(f"cache_dtype={dtype!r} is not one of {', '.join(_DTYPES)}.")
    if type(settings["ended"]) is not bool:
        raise CacheError(f"ended={settings['ended']!r} is neither true nor false.")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise CacheError("Its notes are no lines of text.")
    horizon = settings["horizon"]
    if horizon is not None:
        _check_whole("horizon", horizon, 1, _MOST_TOKENS)
    _check_whole("page_slots", settings["page_slots"], 1, _MOST_PAGE_SLOTS)
    return Run(
        run.recipe,
        run.layers,
        settings["page_slots"],
        run.horizon if horizon is None else horizon,
        run.meter,
        run.notes,
        None if dtype is None else _DTYPES[dtype],
        rotations=run.rotations,
        thresholds=run.thresholds,
    )


def _ids(contents: Contents, layer: Layer, device: torch.device) -> SeenIds:
    """The ids that a cache has seen; nothing else is left in the file."""
    expect(contents.tensors, {IDS: (torch.int32, (ANY, ANY))})
    ids = contents.tensors.pop(IDS)
    batch, columns = ids.shape
    if (columns and batch != len(layer.seen_B)) or columns > layer.columns_seen:
        raise CacheError(f"ids are {list(ids.shape)}, but {layer.columns_seen} tokens were seen.")
    if bool((ids < PADDING).any()):
        raise CacheError("ids are negative.")
    ended = contents.facts["settings"]["ended"]
    return SeenIds([ids.to(device, copy=True)] if columns else [], ended)


def _take(contents: Contents, index: int) -> dict[str, Tensor]:
    """The tensors of one layer, which then belong to nobody else."""
    prefix = f"{index}."
    names = [name for name in contents.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): contents.tensors.pop(name) for name in names}


def _fill(layer: Layer, numbers: Any, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Makes an empty layer what the file says. Raises CacheError."""
    if numbers is None:
        expect(tensors, {})
        return
    _set_numbers(layer, numbers)
    watched = {n: tensors.pop(n) for n in list(tensors) if n.startswith(WATCHED)}
    counters = {name: tensors.pop(name) for name in COUNTERS if name in tensors}
    _set_counters(layer, counters)
    layer.store = _store(layer, tensors, device)
    if kept_channels(layer.store) != numbers["kept_channels"]:
        raise CacheError(f"Old slots do not keep {numbers['kept_channels']} channels.")
    layer.threshold_B = layer.threshold_B.to(layer.store.device)
    layer.store.check_integrity()
    _check_slots(layer)
    _check_quotas(layer)
    _set_watched(layer, watched)
    layer.refresh()


def _set_numbers(layer: Layer, numbers: Any) -> None:
    wanted = {*NUMBERS, "logits", "token_dtype", "kept_channels"}
    if not isinstance(numbers, dict) or numbers.keys() != wanted:
        raise CacheError(f"A layer has {', '.join(sorted(wanted))}, and nothing else.")
    _check_whole("columns_seen", numbers["columns_seen"], 1, _MOST_TOKENS)
    for name in NUMBERS:
        # Tokens of a prompt can be taken back, and it ended behind them.
        most = _MOST_TOKENS if name == "prompted_at" else numbers["columns_seen"]
        _check_whole(name, numbers[name], 0, most)
        setattr(layer, name, numbers[name])
    dtype, logits = numbers["token_dtype"], numbers["logits"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CacheError(f"token_dtype={dtype!r} is not one of {', '.join(_DTYPES)}.")
    layer.token_dtype = _DTYPES[dtype]
    pair = isinstance(logits, list) and len(logits) == 2
    if not pair or not all(type(x) is float and 0 <= x < math.inf for x in logits):
        raise CacheError(f"logits={logits!r} are no scaling and softcap.")
    layer.logits = (logits[0], logits[1])


def _set_counters(layer: Layer, counters: Mapping[str, Tensor]) -> None:
    sequences = counters["seen_B"].numel() if "seen_B" in counters else 0
    sizes = {"B": (sequences,), "R": (sequences * layer.kind.heads,)}
    expect(counters, {name: (dtype, sizes[name[-1]]) for name, dtype in COUNTERS.items()})
    for name, tensor in counters.items():
        if not tensor.is_floating_point() and bool((tensor < 0).any()):
            raise CacheError(f"{name} is negative: {tensor.tolist()}.")
        setattr(layer, name, tensor.clone())
    seen_B, columns = layer.seen_B, layer.columns_seen
    if bool((seen_B > columns).any()) or (not layer.padded_at and bool((seen_B < columns).any())):
        raise CacheError(f"Of {columns} columns {seen_B.tolist()} are tokens.")
    if bool((layer.decoded_B > seen_B).any()):
        raise CacheError(f"Of {seen_B.tolist()} tokens {layer.decoded_B.tolist()} were decoded.")
    own = {"demand_B": layer.recipe.shares, "threshold_B": layer.recipe.merging is not None}
    for name, used in own.items():
        if not used and not bool(counters[name].isnan().all()):
            raise CacheError(f"{name} is {counters[name].tolist()}, but {layer.recipe} has none.")
    portion_B = layer.portion_B
    if not bool((portion_B > 0).all() if layer.recipe.shares else (portion_B == 1).all()):
        raise CacheError(f"Layers cannot get {portion_B.tolist()} of a budget.")


def _store(layer: Layer, tensors: Mapping[str, Tensor], device: torch.device) -> Rows:
    """The store that gave these tensors."""
    prefix = "recent.page." if layer.recipe.formats else "page."
    key, value = (tensors.get(f"{prefix}{name}") for name in (KEY, VALUE))
    if key is None or value is None or not key.dim() == value.dim() == 3 or not value.shape[2]:
        raise CacheError(f"Layer {layer.kind.index} has no pages of keys and values.")
    columns = layer.columns(key.shape[1], value.shape[2])
    sizes = (len(layer.seen_B), layer.kind.heads)
    rows = PagedRows(*sizes, columns, layer.run.page_slots, device)
    store = layer.store = layer.new_store(rows)
    if layer.kind.width not in (0, layer.key_width):
        raise CacheError(
            f"Keys of layer {layer.kind.index} have {layer.key_width} channels, not"
            f" {layer.kind.width}."
        )
    store.load(tensors, lambda kept: _checked_layouts(layer, kept))
    return store


def _checked_layouts(layer: Layer, kept: tuple[int, int]) -> list[PageLayout]:
    """The layouts of old pages that keep so many channels; 0: that is not decided."""
    ours = layouts(layer, kept)
    for layout in ours if any(kept) else ():
        layout.check("load")
    return ours


def _check_slots(layer: Layer) -> None:
    """Raises CacheError unless rows can hold slots of these positions, and mass."""
    rows, seen_B = layer.rows, layer.seen_B
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
    limits, seen_B1 = layer.limits, layer.seen_B[:, None]
    if limits is None or layer.evicted_at == 0:
        return bool((layer.rows.counts_BH == seen_B1).all())
    newest = layer.columns_seen - layer.evicted_at if layer.padded_at <= layer.evicted_at else 0
    recent_B1 = layer.recent_B[:, None] if limits.recent is not None else 0  # a share grows
    last_B1 = torch.minimum(recent_B1 + torch.full_like(seen_B1, newest), seen_B1)
    last_BH = (position_BHS >= (seen_B1 - last_B1)[..., None]).sum(-1)
    sinks_BH = ((position_BHS >= 0) & (position_BHS < limits.sink)).sum(-1)
    return bool((last_BH == last_B1).all()) and bool(
        (sinks_BH == seen_B1.clamp_max(limits.sink)).all()
    )


def _check_quotas(layer: Layer) -> None:
    """Raises CacheError unless the budget can have given these quotas."""
    limits, quota_BH, counts_BH = layer.limits, layer.quota_BH, layer.rows.counts_BH
    index, seen_B, recent_B = layer.kind.index, layer.seen_B, layer.recent_B
    if limits is None:
        if bool((quota_BH != UNLIMITED).any()) or bool(recent_B.any()):
            raise CacheError(f"Layer {index} has quotas, but {layer.recipe} has no budget.")
        return
    tokens = max(1, layer.prompted_at, layer.columns_seen)
    budget = limits.quota(tokens, geometry(layer))
    most = min(budget.slots * layer.kind.heads * max(1, layer.run.layers), UNLIMITED)
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
    odd_B = recent_B > most
    if limits.recent is not None:
        odd_B = (recent_B != 0) & (recent_B != limits.recent)
    if bool(odd_B.any()):
        raise CacheError(f"Layer {index} protects {recent_B.tolist()} recent tokens.")


def _set_watched(layer: Layer, watched: Mapping[str, Tensor]) -> None:
    """Takes the last queries of sequences of which no slot is old yet, in memory of their own."""
    rows, most = layer.rows, layer.recipe.watched
    decided = rows.aging.decided_B.tolist() if rows.aging is not None and most else []
    allowed = {f"{WATCHED}{b}": b for b, known in enumerate(decided) if not known}
    sizes = (layer.kind.queries or ANY, ANY, layer.key_width)
    expect(watched, dict.fromkeys(watched.keys() & allowed.keys(), (layer.token_dtype, sizes)))
    for name, query_NWD in watched.items():
        heads, queries = query_NWD.shape[:2]
        if heads % layer.kind.heads or not heads or queries > most:
            raise CacheError(f"{name} is {list(query_NWD.shape)}: no last {most} queries.")
        layer.watched[allowed[name]] = query_NWD.to(rows.device, copy=True)


def _check_alike(layers: Sequence[Layer], layer: Layer) -> None:
    """Raises CacheError unless it has seen the same tokens as the layers before it."""
    for name in ALIKE:
        one, two = getattr(layers[0], name), getattr(layer, name)
        if not (torch.equal(one, two) if isinstance(one, Tensor) else one == two):
            raise CacheError(f"Layers differ in {name}: {one} and {two}.")
    for other in layers[: layer.kind.index]:
        shapes = [(x.kind.heads, x.key_width, x.value_width) for x in (other, layer) if x.store]
        if len(shapes) == 2 and shapes[0][:2] == shapes[1][:2] and shapes[0] != shapes[1]:
            raise CacheError(f"Layers differ in (KV heads, key and value width): {shapes}.")


def _check_whole(name: str, number: Any, least: int, most: int) -> None:
    if type(number) is not int or not least <= number <= most:
        raise CacheError(f"{name}={number!r} is no whole number from {least} to {most}.")


def layer_numbers(state: Layer) -> dict[str, Any] | None:
    """The numbers of a layer; None for one without tokens."""
    if state.store is None:
        return None
    numbers = {name: getattr(state, name) for name in NUMBERS}
    numbers["logits"] = [float(x) for x in state.logits]
    numbers["kept_channels"] = kept_channels(state.store)
    return {**numbers, "token_dtype": str(state.token_dtype).removeprefix("torch.")}


def kept_channels(store: Rows) -> list[int]:
    """How many channels of keys and values old slots keep; none: there are no such slots."""
    return [] if store.aging is None else store.aging.kept_channels


def layer_tensors(state: Layer) -> dict[str, Tensor]:
    if state.store is None:
        return {}
    counters = {name: getattr(state, name).cpu().clone() for name in COUNTERS}
    watched = {f"{WATCHED}{b}": query.cpu().contiguous() for b, query in state.watched.items()}
    return {**counters, **watched, **state.store.state()}
