"""What an engine would do with a model, by its config alone: nothing is loaded."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM

from kvpress.errors import UnsupportedModelError
from kvpress.hf.support import Fingerprint, check_model

COMPRESSED, WINDOW = "compressed", "keeps its window"
STATE, CHUNK = "keeps its state as it is", "keeps the last tokens of a chunk"
BESIDE, NOTHING = "compressed, and keeps its state as it is", "keeps nothing"
_ITEM = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


class Part(NamedTuple):
    """Layers in a row to which the same happens. token_bytes: of a token, uncompressed."""

    first: int
    last: int
    what: str
    heads: int
    width: int
    token_bytes: int

    @property
    def compressed(self) -> bool:
        """Whether policies decide what these layers keep."""
        return self.what in (COMPRESSED, BESIDE)


class Fate(NamedTuple):
    """What happens to a model. refused: why it cannot be attached to; then there are no parts."""

    model_type: str
    parts: list[Part]
    refused: str = ""

    @property
    def token_bytes(self) -> int:
        """Bytes that a token of a sequence takes in the layers that policies compress."""
        return sum(p.token_bytes * (p.last - p.first + 1) for p in self.parts if p.compressed)


def fate(config: Any) -> Fate:
    """What happens to a model of this config, which is built without weights."""
    name = getattr(config, "model_type", type(config).__name__)
    try:
        with torch.device("meta"):
            model = _class_of(config)(config)
    except Exception as error:  # whatever a config lets its model raise
        return Fate(name, [], f"transformers cannot build it: {error}")
    try:
        shape = check_model(model.eval())
    except UnsupportedModelError as error:
        return Fate(name, [], error.reason)
    stored = config.get_text_config(decoder=True).dtype or torch.float32
    return Fate(name, _parts(shape, _ITEM.get(stored, 4)))


def _class_of(config: Any) -> Any:
    """The class that the config names, if this transformers has it; else one for causal LMs."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return AutoModelForCausalLM.from_config


def _parts(shape: Fingerprint, item: int) -> list[Part]:
    """Layers of a model, those side by side together."""
    every: dict[int, tuple[str, int, int, int]] = {}
    for state in shape.states:
        what = STATE if state.count else CHUNK if state.chunk else NOTHING
        every[state.index] = (what, 0, 0, 0)
    for kind in shape.kinds:
        what = WINDOW if kind.window is not None else COMPRESSED
        if kind.index in every:
            what = BESIDE
        channels = kind.width if kind.latent else 2 * kind.width
        every[kind.index] = (what, kind.heads, kind.width, kind.heads * channels * item)
    runs = groupby(sorted(every), key=lambda index: every[index])
    parts = []
    for same, indices in runs:
        own = list(indices)
        parts.append(Part(own[0], own[-1], *same))
    return parts
