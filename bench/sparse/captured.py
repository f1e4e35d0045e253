"""Queries, keys and values of a real model, for prompts of any length.

A model reads parts of a text one by one, each from its first position on. A longer prompt is these
parts one after the other, their queries and keys turned to the positions where they then stand.
Beyond the context that the model was trained for they turn as YaRN has it (Peng et al., arXiv
2309.00071): plain rotation would make logits of distances that no model has ever seen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from kvpress.bench.calibrate.watch import Given, watching
from kvpress.bench.common.candidates import candidate
from torch import Tensor

from kvpress.errors import KVPressError


class CaptureError(KVPressError, ValueError):
    """States that cannot be extended to a length."""


class Captured:
    """The states of some layers after a model has read parts of a text, ids `[1, T]` each."""

    def __init__(self, model: Any, parts: Sequence[Tensor], layers: set[int]) -> None:
        self._model, self.read = model, parts[0].shape[1]
        found: dict[int, list[Given]] = {layer: [] for layer in layers}
        for ids_1T in parts:
            self._read(ids_1T, found)
        self.layers = {layer: _joined(given) for layer, given in found.items()}

    def _read(self, ids_1T: Tensor, found: dict[int, list[Given]]) -> None:
        index = 0

        def see(given: Given, _: Tensor) -> None:
            nonlocal index
            if index in found:
                found[index].append(given._replace(key_BHQD=given.key_BHQD.clone()))
            index += 1

        full = candidate(self._model, "full")
        with torch.inference_mode(), watching(see):
            full.forward(ids_1T, full.new_cache())

    def of_length(self, layer: int, tokens: int) -> Given:
        """What a layer would hand over for so many tokens. Raises CaptureError."""
        given = self.layers[layer]
        known = given.key_BHQD.shape[2]
        if tokens > known:
            raise CaptureError(
                f"{tokens:,} tokens were asked for, and {known:,} were read: read more parts."
            )
        query, key, value = (x[:, :, :tokens].contiguous() for x in given[:3])
        if tokens <= self.read:
            return Given(query, key, value, given.scaling)
        rotary = getattr(self._model.base_model, "rotary_emb", None)
        if rotary is None:
            raise CaptureError(
                f"{type(self._model).__name__} has no `rotary_emb` by which its keys turn: only"
                f" lengths up to {self.read:,} tokens can be measured."
            )
        target_T = torch.arange(tokens, device=key.device)
        with torch.inference_mode():
            was, then = rotary(key, target_T[None] % self.read), self._longer(rotary, tokens)
            query, key = (_moved(x, was, then(key, target_T[None])) for x in (query, key))
        return Given(query, key, value, given.scaling)

    def _longer(self, rotary: Any, tokens: int) -> Any:
        """What turns states for a prompt of so many tokens, beyond the model's context too."""
        config = copy.deepcopy(self._model.config.get_text_config(decoder=True))
        known, rope = config.max_position_embeddings, config.rope_parameters
        if tokens <= known:
            return rotary
        if rope.get("rope_type") != "default":
            raise CaptureError(
                f"{tokens:,} tokens are beyond the context of {known:,}, and positions of the type"
                f" {rope.get('rope_type')!r} cannot be extended. Give at most {known:,} tokens."
            )
        config.rope_parameters = {
            **rope,
            "rope_type": "yarn",
            "factor": tokens / known,
            "original_max_position_embeddings": known,
        }
        return type(rotary)(config).to(rotary.inv_freq.device)


def _joined(parts: Sequence[Given]) -> Given:
    """Parts of a text one after the other."""
    query, key, value = (torch.cat(states, dim=2) for states in list(zip(*parts, strict=True))[:3])
    return Given(query, key, value, parts[0].scaling)


def _moved(x_BNTD: Tensor, was: Sequence[Tensor], then: Sequence[Tensor]) -> Tensor:
    """States that were turned by one cosine and sine `[1, T, D]`, turned by the other instead."""
    cos_1TD, sin_1TD = was
    return _turn(_turn(x_BNTD, cos_1TD, -sin_1TD), *then)


def _turn(x_BNTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    """x, the first half of its channels paired with the second, turned by an angle."""
    first, second = x_BNTD.chunk(2, -1)
    return x_BNTD * cos_1TD + torch.cat([-second, first], -1) * sin_1TD
