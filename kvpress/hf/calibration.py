"""Thresholds of sparse prompt attention, found once per model and kept in a file."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from kvpress import host
from kvpress.errors import PolicyError
from kvpress.hf.made_files import read_made, shipped_files
from kvpress.hf.ranks import whole
from kvpress.hf.support import Fingerprint
from kvpress.policy.sparsity import Sparsity, Thresholds
from kvpress.store import sealed

SCHEME = "4-bit codes, blocks of 64 × 32, segments of 4"  # what thresholds were found with
UNCALIBRATED = 0.0005  # τ of all heads where nothing is known of a model: 1/16 of the paper's
LEAST = 2048  # new tokens from which attention is sparse where that was not measured
_LOG = logging.getLogger("kvpress")
FOLDER = "calibrations"
_SAMPLE = 64  # elements of every weight that identify a model


class Calibration(NamedTuple):
    """Thresholds and what they hold for.

    least: new tokens from which sparse attention was faster; None: not measured yet. settings: the
    bound of the error, the text, and what else they were found with. done: the samples and layers
    that were looked at.
    """

    tau_LN: Tensor  # fp32
    local: int
    least: int | None
    settings: dict[str, Any]
    done: list[list[int]]


def write(path: str | Path, model: Any, found: Calibration) -> None:
    """Writes a calibration, whole or not at all."""
    facts = {
        "scheme": SCHEME,
        "weights": identity(model),
        "model": model_name(model),
        **{name: getattr(found, name) for name in ("local", "least", "settings", "done")},
    }
    sealed.write(path, {"tau_LN": found.tau_LN}, facts, private=False)


def read(path: str | Path, model: Any) -> Calibration:
    """A calibration of this model.

    Raises PolicyError where it is missing, damaged, or was made for another model or scheme.
    """
    how = "Make one with kvpress calibrate."
    facts, tensors = read_made("calibration", path, "a calibration of thresholds", how)
    if "tau_LN" not in tensors:
        raise PolicyError(f"calibration={path} has no thresholds, tau_LN. {how}")
    for name, ours in (("scheme", SCHEME), ("weights", identity(model))):
        if facts.get(name) != ours:
            raise PolicyError(
                f"calibration={path} was made for {facts.get('model')!r} with {name}="
                f"{facts.get(name)!r}; here it is {ours!r}. Make one for this model with kvpress"
                " calibrate."
            )
    rest: list[Any] = [facts.get(name) for name in Calibration._fields[1:]]
    found = Calibration(tensors["tau_LN"], *rest)
    if not _is_possible(found):
        raise PolicyError(
            f"calibration={path} has a right checksum, but what is in it cannot be a calibration."
            " Make one with kvpress calibrate."
        )
    return found


def _is_possible(found: Calibration) -> bool:
    tau_LN, whole = found.tau_LN, {type(found.local), type(found.least)} <= {int, type(None)}
    if tau_LN.dtype != torch.float32 or tau_LN.dim() != 2 or not whole or found.local is None:
        return False
    possible = bool(((tau_LN >= 0) & tau_LN.isfinite()).all())
    least = 0 if found.least is None else found.least
    return possible and found.local >= 0 <= least and isinstance(found.done, list)


def model_name(model: Any) -> str:
    """What a file calls a model: its name, or that of its folder; a path is nobody's business."""
    return Path(getattr(model.config, "name_or_path", "")).name or type(model).__name__


def identity(model: Any) -> str:
    """A digest of a model whatever it computes in: names, shapes and a sample of its weights."""
    digest = xxhash.xxh3_128()
    for name, weight in sorted(model.state_dict(keep_vars=False).items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if weight.is_floating_point():
            digest.update(_sample(weight))
    return digest.hexdigest()


def _sample(weight: Tensor) -> bytes:
    """Some elements of a weight; nothing of one that has no plain storage."""
    weight = whole(weight)
    if type(weight) is not Tensor or weight.device.type == "meta" or not weight.numel():
        return b""
    step = max(1, weight.numel() // _SAMPLE)
    some = weight.detach().reshape(-1)[::step][:_SAMPLE].cpu().to(torch.bfloat16)
    return some.contiguous().view(torch.uint8).numpy().tobytes()


def thresholds(wanted: Sparsity | None, model: Any, shape: Fingerprint) -> Thresholds | None:
    """What a policy asks for, for this model. Raises PolicyError for a wrong calibration."""
    if wanted is None:
        return None
    config = model.config.get_text_config(decoder=True)
    size = (len(shape.kinds), config.num_attention_heads)
    if wanted.threshold is not None:
        tau_LN = host.full(size, wanted.threshold, dtype=torch.float32)
        return Thresholds(tau_LN, wanted.local, LEAST if wanted.least is None else wanted.least)
    found = read(wanted.calibration, model) if wanted.calibration else _shipped(model)
    if found is None:
        _LOG.warning(
            "No calibration ships for this model: all heads use the threshold %s, which is"
            " conservative. `kvpress calibrate` finds one for every head.",
            UNCALIBRATED,
        )
        found = Calibration(
            host.full(size, UNCALIBRATED, dtype=torch.float32), wanted.local, None, {}, []
        )
    if found.local != wanted.local:
        raise PolicyError(
            f"local={wanted.local}, but the calibration was made with local={found.local}:"
            " thresholds hold for one local area. Leave the option out, or calibrate again."
        )
    if tuple(found.tau_LN.shape) != size:
        raise PolicyError(
            f"The calibration has thresholds for {list(found.tau_LN.shape)} layers and heads, the"
            f" model has {list(size)}. Make one for this model with kvpress calibrate."
        )
    least = wanted.least if wanted.least is not None else found.least
    return Thresholds(found.tau_LN, wanted.local, LEAST if least is None else least)


def _shipped(model: Any) -> Calibration | None:
    """The calibration that comes with the package for this model, if there is one."""
    folder = resources.files("kvpress.hf") / FOLDER
    ours = None
    for file, facts in shipped_files("calibration", Path(str(folder)), ".safetensors"):
        ours = ours or identity(model)
        if facts.get("weights") == ours and "kind" not in facts:
            return read(file, model)
    return None
