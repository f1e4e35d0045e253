"""Caches as files: everything that a cache needs to go on exactly as if it had not been saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpress import __version__, sealed
from kvpress.drafts import commit
from kvpress.errors import CacheFileError
from kvpress.formatting import layouts
from kvpress.lasting import lasting
from kvpress.layer import Layer
from kvpress.store import FormattedRows, PagedRows, Store

FORMAT = 4  # of the file; another one is refused
_NUMBERS = ("columns_seen", "evicted_at", "prompted_at", "padded_at")
_PER_SEQUENCE = (
    *("seen_B", "decoded_B", "quota_R", "recent_B"),
    *("demand_B", "portion_B", "threshold_B"),
)


def save(path: str | Path, layers: Sequence[Layer], facts: Mapping[str, Any]) -> None:
    """Writes the layers of a cache to a file, with what tells which cache it is.

    facts: `model`, `weights` and `policy`, which a reader must have too, and `settings`. Drafted
    tokens become final first.
    """
    for layer in layers:
        commit(layer)
    tensors = {
        f"{layer.kind.index}.{name}": tensor
        for layer in layers
        for name, tensor in _layer_tensors(layer).items()
    }
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


@lasting
def fill(
    layers: Sequence[Layer], contents: sealed.Contents, devices: Mapping[int, torch.device]
) -> None:
    """Fills empty layers from what a file held.

    devices: where the layers of the model are; -1: any other.
    """
    names = list(contents.tensors)
    for layer, known in zip(layers, contents.facts["layers"], strict=True):
        prefix = f"{layer.kind.index}."
        own = [name for name in names if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): contents.tensors.pop(name) for name in own}
        if known is not None:
            _fill(layer, known, tensors, devices.get(layer.kind.index, devices[-1]))


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
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    numbers["logits"] = list(state.logits)
    return {**numbers, "token_dtype": str(state.token_dtype).removeprefix("torch.")}


def _layer_tensors(state: Layer) -> dict[str, Tensor]:
    if state.store is None:
        return {}
    counters = {name: getattr(state, name).cpu().clone() for name in _PER_SEQUENCE}
    watched = {f"watched.{b}": query.cpu().contiguous() for b, query in state.watched.items()}
    return {**counters, **watched, **state.store.state()}


def _fill(
    layer: Layer, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    for name in _NUMBERS:
        setattr(layer, name, numbers[name])
    layer.token_dtype = getattr(torch, numbers["token_dtype"])
    for name in _PER_SEQUENCE:
        setattr(layer, name, tensors[name].clone())
    layer.store = _store(layer, tensors, device)
    prefix = "watched."
    layer.watched = {
        int(name.removeprefix(prefix)): query.to(layer.store.device)
        for name, query in tensors.items()
        if name.startswith(prefix)
    }
    layer.logits = tuple(numbers["logits"])
    layer.threshold_B = layer.threshold_B.to(layer.store.device)
    layer.refresh()


def _store(layer: Layer, tensors: Mapping[str, Tensor], device: torch.device) -> Store:
    """The store that gave these tensors."""
    packs, heads = layer.recipe.formats, layer.kind.heads
    prefix = "recent." if packs else ""
    own = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    columns = layer.columns(own["page.key"].shape[1], own["page.value"].shape[2])
    recent = PagedRows.from_state(own, columns, heads, device)
    layer.store = layer.new_store(recent)
    if isinstance(layer.store, FormattedRows):
        kept = (tensors["key_channels"].shape[-1], tensors["value_channels"].shape[-1])
        layer.store.load(tensors, layouts(layer, kept))
    return layer.store


_VERSIONS = {"format": FORMAT, "engine": __version__}
_REMEDY = {
    "format": "Save it again with this version of the engine.",
    "engine": "Save it again with this version of the engine, or install that one.",
    "model": "Load the model that it was made with.",
    "weights": "Load the weights that it was made with, in the same dtype, with the same config and"
    " the same adapters active (scaling, merged or not).",
    "policy": "Attach the engine with that policy.",
}
