"""Heads by name: the target's own layer, one that was distilled, or a draft model's checkpoint."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvpress.errors import PolicyError
from kvpress.hf.calibration import FOLDER, identity
from kvpress.hf.heads import distilled, eagle3, self_layer
from kvpress.hf.made_files import shipped_files
from kvpress.policy.heads import RetrievalHead

DISTILLED = "distilled"
_ALLOWED = (
    f"{self_layer.NAME}, {self_layer.NAME}@LAYER, {DISTILLED}, the path of a file of kvpress"
    " distill, or of an EAGLE-3 checkpoint"
)


def load_head(name: str, model: Any) -> RetrievalHead:
    """The head that a name or a path stands for, for a model that no engine is attached to.

    `self` is layer 0 of the target, `self@LAYER` another one that gets embeddings alone;
    `distilled` the file that ships for this model. Raises PolicyError, with numbers, for what is
    not there or does not fit the model; UnsupportedModelError where it has no such parts.
    """
    kind, _, rest = name.partition("@")
    if kind == self_layer.NAME:
        if rest and not rest.isdigit():
            raise PolicyError(f"head={name}: behind the @ stands a layer, as in self@0.")
        return self_layer.load(model, int(rest or 0))
    if name == DISTILLED:
        return distilled.load(_shipped(model), model)
    path = Path(name).expanduser()
    if not path.exists():
        raise PolicyError(f"head={name} is neither a head nor a file. Allowed: {_ALLOWED}.")
    return distilled.load(path, model) if _is_ours(path) else eagle3.load(path, model)


def _is_ours(path: Path) -> bool:
    """Whether a file is sealed as ours are; of what is no safetensors file others complain."""
    if path.is_dir():
        return False
    try:
        with safe_open(str(path), framework="pt") as opened:
            return "checksum" in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return True


def _shipped(model: Any) -> Path:
    """The head that comes with the package for this model. Raises PolicyError without one."""
    folder = Path(str(resources.files("kvpress.hf") / FOLDER))
    ours = identity(model)
    for file, facts in shipped_files("head", folder, distilled.SUFFIX):
        if facts.get("weights") == ours:
            return file
    name = getattr(model.config, "name_or_path", "") or "MODEL"
    raise PolicyError(
        f"head={DISTILLED}: no distilled head ships for this model. Make one: kvpress distill"
        f" --model {name} --out FILE, and give it: head=FILE. Or use head={self_layer.NAME}."
    )
