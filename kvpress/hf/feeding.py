"""Passes of an attached model for who batches texts himself: of a prompt, and of many texts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpress.hf.cache import EngineCache
from kvpress.hf.calls import Call, Calls
from kvpress.hf.generation import cache_name
from kvpress.hf.together import Together
from kvpress.hf.unwrap import text_model

# Rotations that look at the longest text of a pass to turn all of them.
_BY_LONGEST = ("dynamic", "longrope")


class Feeding:
    """Feeds texts to a model, each into a cache of its own.

    alone: why texts of different ages cannot share a pass of this model; "" where they can.
    """

    def __init__(self, model: Any, calls: Calls, alone: str) -> None:
        self._model, self._calls, self.alone = model, calls, alone
        taken = inspect.signature(model.forward).parameters
        self._name = cache_name(model)
        self._together: Together | None = None  # of the last step: mostly it is that of the next
        self._places = "position_ids" in taken
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}

    @property
    def device(self) -> torch.device:
        """Where ids go."""
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    @torch.no_grad()
    def read(self, cache: EngineCache, ids: Sequence[int], columns: int) -> Tensor:
        """Logits `[V]`, fp32, behind the next tokens of a prompt of so many columns.

        As `generate()` reads it in chunks. Raises what the policy and the cache raise.
        """
        seen, given = cache.columns_seen, self._given(cache, [list(ids)])
        device = given["input_ids"].device
        given["attention_mask"] = torch.ones(1, seen + len(ids), dtype=torch.int64, device=device)
        if self._places:
            given["position_ids"] = torch.arange(seen, seen + len(ids), device=device)[None]
        with self._calls.entered(Call(cache, None, False, columns)):
            return self._logits(given)[0]

    @torch.no_grad()
    def decode(
        self, caches: Sequence[EngineCache], tokens: Sequence[int]
    ) -> tuple[Tensor, dict[int, Exception]]:
        """Logits `[B, V]`, fp32, behind one more token of each text, and which texts failed.

        The logits of a text that failed mean nothing. Raises what the model raises.
        """
        if self.alone:
            return self._one_by_one(caches, tokens)
        together = self._together
        if together is None or not _same(together.caches, caches):
            together = self._together = Together(caches)
        given = self._given(together, [[token] for token in tokens])
        if self._places:
            places = [[cache.columns_seen] for cache in caches]
            given["position_ids"] = torch.tensor(places, device=self.device, dtype=torch.int64)
        return self._logits(given), dict(together.failed)

    def forget(self) -> None:
        """Lets go of the caches of the last step; to be called when one of them is done with."""
        self._together = None

    def _one_by_one(
        self, caches: Sequence[EngineCache], tokens: Sequence[int]
    ) -> tuple[Tensor, dict[int, Exception]]:
        found: list[Tensor | None] = []
        failed: dict[int, Exception] = {}
        for number, (cache, token) in enumerate(zip(caches, tokens, strict=True)):
            found.append(None)
            try:
                found[-1] = self.read(cache, [token], cache.columns_seen + 1)
            except Exception as error:
                failed[number] = error
        width = next((len(x) for x in found if x is not None), 1)
        empty = torch.zeros(width, device=self.device, dtype=torch.float32)
        return torch.stack([empty if x is None else x for x in found]), failed

    def _given(self, cache: Any, ids: list[list[int]]) -> dict[str, Any]:
        tokens = torch.tensor(ids, dtype=torch.int64, device=self.device)
        return {"input_ids": tokens, self._name: cache, "use_cache": True, **self._last}

    def _logits(self, given: dict[str, Any]) -> Tensor:
        logits: Tensor = self._model(**given).logits[:, -1].float()
        return logits


def _same(some: Sequence[EngineCache], others: Sequence[EngineCache]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def alone_because(model: Any, cache: EngineCache) -> str:
    """Why texts of different ages cannot share a pass of a model; "" where they can.

    cache: an empty one. Attention is done text by text. Everything else that looks beyond a row of
    the pass would be another thing than for the text alone.
    """
    text = text_model(model)
    if cache.beside:
        return "layers of this model keep states besides keys and values"
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if not takes and any(state.kind.slopes is None for state in cache.states):
        return "this model counts positions by itself, for all texts alike"
    for module in text.modules():
        if getattr(module, "rope_type", None) in _BY_LONGEST:
            return "this model turns keys by the longest text of a pass"
    return ""
