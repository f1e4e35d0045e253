"""Caches as files: everything that a cache needs to go on as if it had not been saved.

What is added to a layer is added to the tables here, and restoring.py checks its type and shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpress import __version__, sealed
from kvpress.drafts import commit
from kvpress.errors import CacheFileError
from kvpress.ids import SeenIds
from kvpress.lasting import lasting
from kvpress.layer import Layer
from kvpress.store import FormattedRows, Store

FORMAT = 4  # of the file; another one is refused
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


def save(path: str | Path, layers: Sequence[Layer], ids: SeenIds, facts: Mapping[str, Any]) -> None:
    """Writes the layers of a cache to a file, with what tells which cache it is.

    ids: what the cache has seen. facts: `model`, `weights` and `policy`, which a reader must have
    too, and `settings`. Drafted tokens become final first.
    """
    for layer in layers:
        commit(layer)
    tensors = {
        f"{layer.kind.index}.{name}": tensor
        for layer in layers
        for name, tensor in _layer_tensors(layer).items()
    }
    tensors[IDS] = ids.all()
    numbers = [_layer_numbers(layer) for layer in layers]
    sealed.write(path, tensors, {**_VERSIONS, **facts, "layers": numbers})


@lasting
def read(path: str | Path, expected: Mapping[str, Any]) -> sealed.Contents:
    """What a file holds. Raises CacheFileError if it is not whole, or not what is expected."""
    contents = sealed.read(path)
    for name, ours in {**_VERSIONS, **expected}.items():
        if contents.facts.get(name) != ours:
            raise CacheFileError(
                f"{path} was saved with {name}={contents.facts.get(name)!r}, but here it is"
                f" {ours!r}. {_REMEDY[name]}"
            )
    return contents


def layer_devices(model: torch.nn.Module) -> dict[int, torch.device]:
    """Where each layer of a model is; -1: where the model as a whole is."""
    devices = {-1: next((p.device for p in model.parameters()), torch.device("cpu"))}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        device = next((p.device for p in module.parameters()), None)
        if isinstance(index, int) and device is not None and device.type != "meta":
            devices[index] = device
    return devices


def _layer_numbers(state: Layer) -> dict[str, Any] | None:
    """The numbers of a layer; None for one without tokens."""
    if state.store is None:
        return None
    numbers = {name: getattr(state, name) for name in NUMBERS}
    numbers["logits"] = [float(x) for x in state.logits]
    numbers["kept_channels"] = kept_channels(state.store)
    return {**numbers, "token_dtype": str(state.token_dtype).removeprefix("torch.")}


def kept_channels(store: Store) -> list[int]:
    """How many channels of keys and values old slots keep; none: there are no such slots."""
    parts = store.parts if isinstance(store, FormattedRows) else []
    return [part.layout.key_kept for part in parts] + [part.layout.value_kept for part in parts]


def _layer_tensors(state: Layer) -> dict[str, Tensor]:
    if state.store is None:
        return {}
    counters = {name: getattr(state, name).cpu().clone() for name in COUNTERS}
    watched = {f"{WATCHED}{b}": query.cpu().contiguous() for b, query in state.watched.items()}
    return {**counters, **watched, **state.store.state()}


_VERSIONS = {"format": FORMAT, "engine": __version__}
_REMEDY = {
    "format": "Save it again with this version of the engine.",
    "engine": "Save it again with this version of the engine, or install that one.",
    "model": "Load the model that it was made with.",
    "weights": "Load the weights that it was made with, in the same dtype, with the same config and"
    " the same adapters active (scaling, merged or not).",
    "policy": "Attach the engine with that policy.",
}
