"""What policies need to know of a model beforehand: tensors in a file of `kvpress calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.hf.calibration import FOLDER, identity, model_name
from kvpress.hf.made_files import read_made, shipped_files
from kvpress.hf.support import Fingerprint
from kvpress.policy.pooling import Calibrated
from kvpress.policy.recipe import Recipe
from kvpress.store import sealed


class Learned(NamedTuple):
    """What was found out of a model.

    settings: with what. done: how many texts were looked at. finished: whether that was all.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    done: int = 0
    finished: bool = False


def write(path: str | Path, model: Any, kind: str, found: Learned) -> None:
    """Writes what was found out, whole or not at all."""
    facts = {
        "kind": kind,
        "weights": identity(model),
        "model": model_name(model),
        **{name: getattr(found, name) for name in Learned._fields[1:]},
    }
    sealed.write(path, found.tensors, facts, private=False)


def read(path: str | Path, model: Any, kind: str) -> Learned:
    """What was found out of this model.

    Raises PolicyError where the file is missing, damaged, or of another model or kind.
    """
    how = f"Make one with kvpress calibrate {kind}."
    facts, tensors = read_made("calibration", path, f"a calibration of {kind}", how)
    for name, ours in (("kind", kind), ("weights", identity(model))):
        if facts.get(name) != ours:
            raise PolicyError(
                f"calibration={path} was made for {facts.get('model')!r} with {name}="
                f"{facts.get(name)!r}; here it is {ours!r}. {how}"
            )
    rest: list[Any] = [facts.get(name) for name in Learned._fields[1:]]
    finite = all(bool(x.float().isfinite().all()) for x in tensors.values())
    if [type(x) for x in rest] != [dict, int, bool] or not finite:
        raise PolicyError(
            f"calibration={path} has a right checksum, but what is in it cannot be a calibration."
            f" {how}"
        )
    return Learned(dict(tensors), *rest)


def calibrated(
    recipe: Recipe, model: Any, shape: Fingerprint
) -> dict[Calibrated, Mapping[str, Tensor]]:
    """What the policies of a recipe need to know of this model, for the layers that have a budget.

    Raises PolicyError where nobody found it out: nothing is guessed.
    """
    known: dict[Calibrated, Mapping[str, Tensor]] = {}
    for policy in recipe.policies:
        wanted = policy.calibrated
        if wanted is None or wanted in known:
            continue
        file = wanted.file or _shipped(model, wanted.kind)
        if file is None:
            raise PolicyError(
                f"{policy.name} needs a calibration, and none ships for this model. Make one:"
                f" kvpress calibrate {wanted.kind} --model"
                f" {getattr(model.config, 'name_or_path', '') or 'MODEL'} --out FILE, and give it:"
                f" {policy.name}:calibration=FILE."
            )
        known[wanted] = _fitting(read(file, model, wanted.kind), wanted, shape, file)
    return known


def _fitting(
    found: Learned, wanted: Calibrated, shape: Fingerprint, file: str | Path
) -> dict[str, Tensor]:
    """The tensors that are wanted, in fp32, if they are there and of so many layers."""
    how = f"kvpress calibrate {wanted.kind}"
    if not found.finished:
        raise PolicyError(
            f"calibration={file} is unfinished: {found.done} texts were read. Run {how} with the"
            " same options again; it goes on from there."
        )
    missing = [name for name in wanted.names if name not in found.tensors]
    if missing:
        raise PolicyError(
            f"calibration={file} has no {', '.join(missing)}, but {', '.join(found.tensors)}: {how}"
            " could not find it out for this model, or was of an earlier version. Run it again; it"
            " adds what is missing, or says why not."
        )
    tensors = {name: found.tensors[name] for name in wanted.names}
    layers = sum(kind.window is None for kind in shape.kinds)
    if any(len(x) != layers for x in tensors.values()):
        raise PolicyError(
            f"calibration={file} is of other layers than the {layers} of this model that have a"
            " budget. Make one for this model with kvpress calibrate."
        )
    return {name: x.to(torch.float32) for name, x in tensors.items()}


def _shipped(model: Any, kind: str) -> Path | None:
    """The file that comes with the package for this model, if there is one."""
    folder = resources.files("kvpress.hf") / FOLDER
    ours = None
    for file, facts in shipped_files("calibration", Path(str(folder)), ".safetensors"):
        ours = ours or identity(model)
        if facts.get("weights") == ours and facts.get("kind") == kind:
            return file
    return None
