"""Queries, keys and values of a real model, for prompts of any length.

Beyond what the model has read, the states of its tokens are repeated as they were before their
rotation, and rotated to the positions where they then stand.
"""

from __future__ import annotations

from typing import Any

import torch
from kvpress.bench.calibrate.search import Given, watching
from kvpress.bench.candidates import candidate
from torch import Tensor

from kvpress.errors import KVPressError


class CaptureError(KVPressError, ValueError):
    """States that cannot be extended to a length."""


class Captured:
    """The states of some layers after a model has read a text."""

    def __init__(self, model: Any, ids_1T: Tensor, layers: set[int]) -> None:
        self._model, self.layers = model, {}  # type: Any, dict[int, Given]
        index = 0

        def see(given: Given, _: Tensor) -> None:
            nonlocal index
            if index in layers:
                self.layers[index] = given._replace(key_BHPD=given.key_BHPD.clone())
            index += 1

        rival = candidate(model, "full")
        with torch.inference_mode(), watching(see):
            rival.forward(ids_1T, rival.new_cache())

    def of_length(self, layer: int, tokens: int) -> Given:
        """What a layer would hand over for so many tokens. Raises CaptureError."""
        given = self.layers[layer]
        read = given.key_BHPD.shape[2]
        if tokens <= read:
            query, key, value = (x[:, :, :tokens].contiguous() for x in given[:3])
            return Given(query, key, value, given.scaling)
        source = torch.arange(tokens, device=given.key_BHPD.device) % read
        query, key = (self._moved(x, source) for x in given[:2])
        return Given(query, key, given.value_BHPE[:, :, source], given.scaling)

    def _moved(self, x_BNPD: Tensor, source_T: Tensor) -> Tensor:
        """States of the tokens `source`, turned from their own positions to 0, 1, 2, …"""
        rotary = getattr(self._model.base_model, "rotary_emb", None)
        if rotary is None:
            raise CaptureError(
                f"{type(self._model).__name__} has no `rotary_emb` by which its keys turn: only"
                f" lengths up to {x_BNPD.shape[2]:,} tokens can be measured."
            )
        moved_BNTD = x_BNPD[:, :, source_T]
        target_T = torch.arange(len(source_T), device=source_T.device)
        with torch.inference_mode():
            cos, sin = rotary(moved_BNTD, source_T[None])
            back_BNTD = _turn(moved_BNTD, cos, -sin)
            cos, sin = rotary(moved_BNTD, target_T[None])
        return _turn(back_BNTD, cos, sin)


def _turn(x_BNTD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    """x, the first half of its channels paired with the second, turned by an angle."""
    first, second = x_BNTD.chunk(2, -1)
    return x_BNTD * cos_1TD + torch.cat([-second, first], -1) * sin_1TD
