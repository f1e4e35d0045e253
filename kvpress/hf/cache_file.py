"""Caches as files: everything that a cache needs to go on as if it had not been saved.

What belongs to a sequence is saved with the others (pipe/state/sequences.py); what is read back is
checked in pipe/state/snapshot.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kvpress.env import __version__
from kvpress.errors import CacheFileError
from kvpress.hf.spec import CacheSpec
from kvpress.host import lasting
from kvpress.pipe.drafts import commit
from kvpress.pipe.state.context import Context
from kvpress.pipe.state.ids import SeenIds
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.snapshot import IDS, Restored, layer_numbers, layer_tensors, restore
from kvpress.store import sealed

FORMAT = 5  # of the file; another one is refused


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
        for name, tensor in layer_tensors(layer).items()
    }
    tensors[IDS] = ids.all()
    numbers = [layer_numbers(layer) for layer in layers]
    sealed.write(path, tensors, {**_VERSIONS, **facts, "layers": numbers})


def settings(context: Context, horizon: int | None, ended: bool) -> dict[str, Any]:
    """What a saved cache needs besides its layers, as plain values.

    horizon: new tokens that were announced. ended: whether sequences that met their end early were
    fed padding.
    """
    dtype = context.cache_dtype
    return {
        "horizon": horizon,
        "page_slots": context.page_slots,
        "cache_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "notes": list(context.ledger.notes),
        "ended": ended,
    }


def load(
    path: str | Path, spec: CacheSpec, context: Context, devices: Mapping[int, torch.device]
) -> Restored:
    """What a file holds of a cache of this kind. context: of a new one; it stays as it is.

    Raises CacheFileError.
    """
    return restore(path, read(path, spec.facts()), spec.fingerprint.kinds, context, devices)


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


_VERSIONS = {"format": FORMAT, "engine": __version__}
_REMEDY = {
    "format": "Save it again with this version of the engine.",
    "engine": "Save it again with this version of the engine, or install that one.",
    "model": "Load the model that it was made with.",
    "weights": "Load the weights that it was made with, in the same dtype, with the same config and"
    " the same adapters active (scaling, merged or not).",
    "policy": "Attach the engine with that policy.",
}
