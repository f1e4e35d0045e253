"""Caches as files: everything that a cache needs to go on as if it had not been saved.

What belongs to a sequence is saved with the others (pipe/state/sequences.py); what is read back is
checked in pipe/state/snapshot.py.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kvpress.env import __version__
from kvpress.errors import CacheFileError
from kvpress.hf.spec import CacheSpec
from kvpress.host import lasting
from kvpress.parallel import ALONE, Ranks
from kvpress.pipe.drafts import commit
from kvpress.pipe.state.context import Context
from kvpress.pipe.state.ids import SeenIds
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.snapshot import BESIDE, IDS, Restored, layer_numbers, layer_tensors, restore
from kvpress.store import sealed
from kvpress.store.tiers.beside import PAGES, named_by, tidy
from kvpress.store.tiers.data_file import DataFile, Source
from kvpress.store.tiers.syscalls import Syscalls
from kvpress.store.tiers.tiers import Tiers

Devices: TypeAlias = Mapping[int, torch.device]  # where layers are; -1: the model as a whole
FORMAT = 5  # of the file; another one is refused
TIERS = "tiers"  # what else pages of tiers depend on


def save(
    path: str | Path,
    layers: Sequence[Layer],
    ids: SeenIds,
    beside: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    tiers: Tiers | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Writes the layers of a cache to a file, with what tells which cache it is.

    ids: what the cache has seen. facts: `model`, `weights` and `policy`, which a reader must have
    too, and `settings`. beside: what layers hold besides keys and values, by name. tiers: where its
    pages are; they go to a second file. ranks: of which each writes a file of its own. Drafted
    tokens become final first.
    """
    path = part_of(path, ranks)
    known = {**_VERSIONS, **facts, **_described(layers)}
    if tiers is None:
        sealed.write(path, _tensors(layers, ids, beside), known)
        tidy(sealed.real_path(path))  # those of a session that was there before
        return
    manifest = sealed.real_path(path)
    try:
        with tiers.lock, DataFile(manifest, tiers.facts) as data:
            tensors = _tensors(layers, ids, beside, data)
            known |= {TIERS: tiers.facts.text, PAGES: data.finish()}
            sealed.write(manifest, tensors, known)
    except OSError as error:
        raise CacheFileError(
            f"{path} cannot be written: {error}. Nothing was changed. Free some space, or give the"
            " path of a file in a folder that exists and may be written to."
        ) from error


def contents(
    layers: Sequence[Layer],
    ids: SeenIds,
    beside: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
) -> sealed.Contents:
    """What a file would hold, in tensors of their own on the host; not of caches with tiers."""
    known = {"settings": settings, **_described(layers)}
    return sealed.Contents(known, _tensors(layers, ids, beside))


def _described(layers: Sequence[Layer]) -> dict[str, Any]:
    """The numbers of layers. Drafted tokens become final first."""
    for layer in layers:
        commit(layer)
    return {"layers": [layer_numbers(layer) for layer in layers]}


def _tensors(
    layers: Sequence[Layer],
    ids: SeenIds,
    beside: Mapping[str, torch.Tensor],
    data: DataFile | None = None,
) -> dict[str, torch.Tensor]:
    """Everything that a cache holds, but pages of tiers: those go to a data file."""
    tensors = {IDS: ids.all(), **{f"{BESIDE}.{name}": x for name, x in beside.items()}}
    for layer in layers:
        for name, tensor in layer_tensors(layer, data).items():
            tensors[f"{layer.kind.index}.{name}"] = tensor
    return tensors


def part_of(path: str | Path, ranks: Ranks) -> Path:
    """The file of this process: `NAME.rank0of2.safetensors`; the path itself where it is alone."""
    whole = sealed.real_path(path)
    if ranks.alone:
        return whole
    return whole.with_name(f"{whole.stem}.rank{ranks.rank}of{ranks.size}{whole.suffix}")


def present_part(path: str | Path, ranks: Ranks) -> Path:
    """The same of a cache that was saved. Raises CacheFileError where others saved it."""
    own, whole = part_of(path, ranks), sealed.real_path(path)
    parts = sorted(whole.parent.glob(f"{glob.escape(whole.stem)}.rank*of*{whole.suffix}"))
    if own.exists() or not (parts or whole.exists()):
        return own
    by = f"{parts[-1].stem.rpartition('of')[2]} processes" if parts else "one process"
    raise CacheFileError(
        f"{path} was saved by {by}, but here {ranks.size} hold the model: each has the heads that"
        " are its own. Load it with as many processes as saved it."
    )


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
    path: str | Path,
    spec: CacheSpec,
    context: Context,
    devices: Devices,
    lazy: bool = False,
) -> Restored:
    """What a file holds of a cache of this kind. context: of a new one; it stays as it is.

    lazy: pages of tiers stay in the session's data file until they are wanted. Raises
    CacheFileError, and TierError where tiers have no room.
    """
    tiers, kinds, path = context.tiers, spec.fingerprint.kinds, present_part(path, spec.ranks)
    if lazy and (tiers is None or tiers.vault is None):
        raise CacheFileError(
            "lazy=True reads pages through the host: attach the engine with device= and host= or"
            " disk=, or leave it out."
        )
    if tiers is None:
        return restore(path, read(path, spec), kinds, context, devices)
    contents, source = _session(path, spec, lazy)
    with tiers.reading(source):
        return restore(path, contents, kinds, context, devices)


def _session(path: str | Path, spec: CacheSpec, lazy: bool) -> tuple[sealed.Contents, Source]:
    """A manifest and its data file; of another save if the first one is replaced meanwhile."""
    manifest = sealed.real_path(path)
    while True:
        contents = read(path, spec)
        pages = contents.facts.get(PAGES)
        try:
            return contents, Source(manifest, pages, lazy, Syscalls())
        except CacheFileError:
            if not isinstance(pages, dict) or named_by(manifest) in (pages.get("id"), "", None):
                raise


@lasting
def read(path: str | Path, spec: CacheSpec) -> sealed.Contents:
    """What a file holds. Raises CacheFileError if it is not whole, or not of such a cache."""
    contents = sealed.read(path)
    expected: dict[str, Any] = {**_VERSIONS, **spec.facts()}
    for name, ours in expected.items():
        if contents.facts.get(name) != ours:
            raise CacheFileError(
                f"{path} was saved with {name}={contents.facts.get(name)!r}, but here it is"
                f" {ours!r}. {_REMEDY[name]}"
            )
    theirs, tiers = contents.facts.get(TIERS), spec.tiers
    if (theirs is None) != (tiers is None):
        done, here = ("with", "without") if tiers is None else ("without", "with")
        raise CacheFileError(
            f"{path} was saved by an engine {done} tiers (device=, host=, disk=), but this one is"
            f" {here} them. Attach an engine {done} them to load it."
        )
    if tiers is not None and theirs != tiers.facts.text:
        raise CacheFileError(
            f"{path} has pages of {theirs!r}, but here they are of {tiers.facts.text!r}. Attach the"
            " engine with the same policy, dtype (cache_dtype=) and rotary settings."
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
    "part": "Each process loads its own file, of as many processes as saved it.",
    "format": "Save it again with this version of the engine.",
    "engine": "Save it again with this version of the engine, or install that one.",
    "model": "Load the model that it was made with.",
    "weights": "Load the weights that it was made with, in the same dtype, with the same config and"
    " the same adapters active (scaling, merged or not).",
    "policy": "Attach the engine with that policy.",
}
