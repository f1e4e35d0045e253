"""Layers from what a file holds. Nothing of it is believed: a checksum is no signature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress.errors import CacheError, CacheFileError, KVPressError, TierError
from kvpress.formulas.page_layout import PageLayout
from kvpress.host import lasting
from kvpress.ops.shapes import FLOATS
from kvpress.pipe.state.context import Context, Ledger
from kvpress.pipe.state.ids import PADDING, SeenIds
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import layouts
from kvpress.pipe.state.plausible import (
    check_alike,
    check_counters,
    check_quotas,
    check_slots,
    check_whole,
)
from kvpress.pipe.state.sequences import Earlier, Recalled, Watched
from kvpress.pipe.state.spans import Spans
from kvpress.store import Rows
from kvpress.store.base import KEY, VALUE
from kvpress.store.saved import ANY, expect
from kvpress.store.sealed import Contents
from kvpress.store.tiers.data_file import DataFile
from kvpress.types import LayerKind

NUMBERS = ("columns_seen", "evicted_at", "prompted_at", "padded_at")  # of a layer

IDS = "ids"  # of the whole cache, [B, T]
BESIDE = "states"  # what is no key, value or id

_MOST_TOKENS = 2**31 - 1  # positions are int32
_MOST_PAGE_SLOTS = 4096
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


class Restored(NamedTuple):
    """What a cache is made of."""

    context: Context
    layers: list[Layer]
    ids: SeenIds
    horizon: int | None  # new tokens that were announced
    beside: dict[str, Tensor]  # what layers hold besides keys and values, by name


@lasting
@torch.no_grad()
def restore(
    path: str | Path,
    contents: Contents,
    kinds: Sequence[LayerKind],
    context: Context,
    devices: Mapping[int, torch.device],
) -> Restored:
    """What was saved; what the layers share is made from `context`, which stays as it is.

    devices: where the layers of the model are; -1: any other. Raises CacheFileError for anything
    that no cache of this model and policy can hold. What can be, for instance other keys, is not
    told from what was saved. Takes the tensors out of `contents`, layer by layer.
    """
    try:
        context = _context(contents.facts.get("settings"), context)
        known = contents.facts.get("layers")
        if not isinstance(known, list) or len(known) != len(kinds):
            raise CacheError(f"It does not describe {len(kinds)} layers.")
        layers = [Layer(kind, context) for kind in kinds]
        context.layers = layers
        for layer, numbers in zip(layers, known, strict=True):
            index = layer.kind.index
            _fill(layer, numbers, _take(contents, index), devices.get(index, devices[-1]))
            check_alike(layers, layer)
        beside = _take(contents, BESIDE)
        ids = _ids(contents, layers[0], devices[-1])
    except (CacheFileError, TierError):
        raise
    except KVPressError as error:
        raise CacheFileError(
            f"{path} has a right checksum, but what is in it cannot be: {error} Nothing was loaded."
            " Save the cache again."
        ) from error
    return Restored(context, layers, ids, contents.facts["settings"]["horizon"], beside)


def _context(settings: Any, context: Context) -> Context:
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
        check_whole("horizon", horizon, 1, _MOST_TOKENS)
    check_whole("page_slots", settings["page_slots"], 1, _MOST_PAGE_SLOTS)
    return Context(
        context.recipe,
        context.compressed,
        settings["page_slots"],
        context.horizon if horizon is None else horizon,
        Ledger(context.ledger.meter, dict.fromkeys([*context.ledger.notes, *notes])),
        None if dtype is None else _DTYPES[dtype],
        context.rotations,
        context.thresholds,
        calibrated=context.calibrated,
        tiers=context.tiers,
        outlook=None if context.outlook is None else context.outlook.copy(),
        heap=context.heap,
    )


def _ids(contents: Contents, layer: Layer, device: torch.device) -> SeenIds:
    """The ids that a cache has seen; nothing else is left in the file."""
    expect(contents.tensors, {IDS: (torch.int32, (ANY, ANY))})
    ids = contents.tensors.pop(IDS)
    batch, columns = ids.shape
    if (columns and batch != len(layer.sequences)) or columns > layer.columns_seen:
        raise CacheError(f"ids are {list(ids.shape)}, but {layer.columns_seen} tokens were seen.")
    if bool((ids < PADDING).any()):
        raise CacheError("ids are negative.")
    ended = contents.facts["settings"]["ended"]
    return SeenIds([ids.to(device, copy=True)] if columns else [], ended)


def _take(contents: Contents, index: int | str) -> dict[str, Tensor]:
    """The tensors of one layer, or of all that is beside them, which then belong to nobody else."""
    prefix = f"{index}."
    names = [name for name in contents.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): contents.tensors.pop(name) for name in names}


def _fill(layer: Layer, numbers: Any, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Makes an empty layer what the file says. Raises CacheError."""
    if numbers is None:
        expect(tensors, {})
        return
    _set_numbers(layer, numbers)
    watched, recalled, earlier = (
        {n: tensors.pop(n) for n in list(tensors) if n.startswith(kept.PREFIX)}
        for kept in (Watched, Recalled, Earlier)
    )
    _set_counters(layer, tensors)
    layer.store = _store(layer, tensors, device)
    if _kept_channels(layer.store) != numbers["kept_channels"]:
        raise CacheError(f"Old slots do not keep {numbers['kept_channels']} channels.")
    layer.store.check_integrity()
    check_slots(layer)
    check_quotas(layer)
    layer.sequences.move(layer.store.device)
    _set_watched(layer, watched)
    _set_recalled(layer, recalled)
    _set_earlier(layer, earlier)
    layer.refresh()


def _set_numbers(layer: Layer, numbers: Any) -> None:
    wanted = {*NUMBERS, "logits", "token_dtype", "kept_channels"}
    if not isinstance(numbers, dict) or numbers.keys() != wanted:
        raise CacheError(f"A layer has {', '.join(sorted(wanted))}, and nothing else.")
    check_whole("columns_seen", numbers["columns_seen"], 1, _MOST_TOKENS)
    for name in NUMBERS:
        # Tokens of a prompt can be taken back, and it ended behind them.
        most = _MOST_TOKENS if name == "prompted_at" else numbers["columns_seen"]
        check_whole(name, numbers[name], 0, most)
        setattr(layer, name, numbers[name])
    dtype, logits = numbers["token_dtype"], numbers["logits"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CacheError(f"token_dtype={dtype!r} is not one of {', '.join(_DTYPES)}.")
    layer.token_dtype = _DTYPES[dtype]
    pair = isinstance(logits, list) and len(logits) == 2
    if not pair or not all(type(x) is float and 0 <= x < math.inf for x in logits):
        raise CacheError(f"logits={logits!r} are no scaling and softcap.")
    layer.logits = (logits[0], logits[1])


def _set_counters(layer: Layer, tensors: dict[str, Tensor]) -> None:
    """Takes the counters of sequences and rows out of the tensors of a layer."""
    own = layer.sequences
    counters = {name: counter.dtype for name, counter in own.counters().items()}
    counters["decoded_B"] = torch.int64
    found = {name: tensors.pop(name) for name in counters if name in tensors}
    sequences = found["seen_B"].numel() if "seen_B" in found else 0
    sizes = {"B": (sequences,), "R": (sequences * layer.kind.heads,)}
    expect(found, {name: (dtype, sizes[name[-1]]) for name, dtype in counters.items()})
    for name, tensor in found.items():
        if not tensor.is_floating_point() and bool((tensor < 0).any()):
            raise CacheError(f"{name} is negative: {tensor.tolist()}.")
    own.load(found)
    expect({n: x for n, x in tensors.items() if n == "spans"}, {"spans": (torch.int64, (ANY, 3))})
    own.spans = Spans.load(tensors.pop("spans"), sequences)
    check_counters(layer)


def _store(layer: Layer, tensors: Mapping[str, Tensor], device: torch.device) -> Rows:
    """The store that gave these tensors."""
    prefix = "recent.page." if layer.stores.packs else "page."
    key, value = (tensors.get(f"{prefix}{name}") for name in (KEY, VALUE))
    if key is None or value is None or not key.dim() == value.dim() == 3 or not value.shape[2]:
        raise CacheError(f"Layer {layer.kind.index} has no pages of keys and values.")
    columns = layer.stores.columns(layer.token_dtype, key.shape[1], value.shape[2])
    sizes = (len(layer.sequences), layer.kind.heads)
    store = layer.store = layer.stores.empty(columns, *sizes, device)
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


def _set_watched(layer: Layer, watched: Mapping[str, Tensor]) -> None:
    """Takes the last queries of sequences of which no slot is old yet, in memory of their own."""
    rows, most = layer.rows, layer.recipe.watched
    decided = rows.aging.decided_B.tolist() if rows.aging is not None and most else []
    allowed = {f"{Watched.PREFIX}{b}": b for b, known in enumerate(decided) if not known}
    sizes = (layer.kind.queries or ANY, ANY, layer.key_width)
    expect(watched, dict.fromkeys(watched.keys() & allowed.keys(), (layer.token_dtype, sizes)))
    for name, query_NQD in watched.items():
        heads, queries = query_NQD.shape[:2]
        if heads % layer.kind.heads or not heads or queries > most:
            raise CacheError(f"{name} is {list(query_NQD.shape)}: no last {most} queries.")
        layer.sequences.watched[allowed[name]] = query_NQD.to(rows.device, copy=True)


def _set_recalled(layer: Layer, recalled: Mapping[str, Tensor]) -> None:
    """Takes the last queries of all sequences, in memory of their own."""
    most, seen = layer.recalled, layer.sequences.seen_B.tolist()
    wanted = {f"{Recalled.PREFIX}{b}": b for b, tokens in enumerate(seen) if most and tokens}
    sizes = (layer.kind.queries or ANY, ANY, layer.key_width)
    expect(recalled, dict.fromkeys(wanted, (layer.token_dtype, sizes)))
    for name, query_NQD in recalled.items():
        heads, queries = query_NQD.shape[:2]
        if (
            heads % layer.kind.heads
            or not heads
            or not 0 < queries <= min(most, seen[wanted[name]])
        ):
            raise CacheError(f"{name} is {list(query_NQD.shape)}: no last {most} queries.")
        layer.sequences.recalled[wanted[name]] = query_NQD.to(layer.rows.device, copy=True)


def _set_earlier(layer: Layer, earlier: Mapping[str, Tensor]) -> None:
    """Takes the queries by which the next step chooses pages, in memory of their own."""
    rule, batch = layer.stores.retrieval, len(layer.sequences)
    wanted = rule is not None and rule.turn is not None
    allowed = {f"{Earlier.PREFIX}{b}": b for b in range(batch if wanted else 0)}
    sizes = (layer.kind.queries or ANY, layer.key_width)
    expect(earlier, dict.fromkeys(earlier.keys() & allowed.keys(), (layer.token_dtype, sizes)))
    for name, query_ND in earlier.items():
        if not len(query_ND) or len(query_ND) % layer.kind.heads:
            raise CacheError(f"{name} is {list(query_ND.shape)}: no queries of a step.")
        layer.sequences.earlier[allowed[name]] = query_ND.to(layer.rows.device, copy=True)


def layer_numbers(state: Layer) -> dict[str, Any] | None:
    """The numbers of a layer; None for one without tokens."""
    if state.store is None:
        return None
    numbers = {name: getattr(state, name) for name in NUMBERS}
    numbers["logits"] = [float(x) for x in state.logits]
    numbers["kept_channels"] = _kept_channels(state.store)
    return {**numbers, "token_dtype": str(state.token_dtype).removeprefix("torch.")}


def _kept_channels(store: Rows) -> list[int]:
    """How many channels of keys and values old slots keep; none: there are no such slots."""
    return [] if store.aging is None else store.aging.kept_channels


def layer_tensors(layer: Layer, data: DataFile | None = None) -> dict[str, Tensor]:
    """Everything that a layer holds, on the host. data: where pages of tiers are written."""
    if layer.store is None:
        return {}
    return {**layer.sequences.state(), **layer.store.saved(data)}
