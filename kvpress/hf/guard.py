"""Holding an engine to its plan: what would exceed its memory is refused before it begins."""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakSet

from torch import Tensor

from kvpress.errors import PlanError
from kvpress.hf.cache import EngineCache
from kvpress.pipe.plan.plan import Plan
from kvpress.policy.loading import parse

_AGAIN = "Attach again with"


class Guard:
    """What all caches of a planned engine may come to together.

    plan: in which texts were promised to fit.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self._caches = plan, WeakSet[EngineCache]()
        limits = parse(plan.policy).limits
        # Slots of a row besides those of decoded tokens, where these all stay until a prompt comes.
        self._kept: int | None = None
        if limits is not None and not limits.interval:
            self._kept = int(limits.budget.amount) if limits.budget.unit == "tokens" else 0

    def call(self, given: dict[str, Any], columns: int, new: int) -> None:
        """Checks what a call of `generate()` may come to, and has its prompt read in chunks.

        given: its arguments, which are changed. columns: of the whole text. Raises PlanError.
        """
        texts = self.plan.texts
        if columns + new > texts.length:
            raise PlanError(
                f"generate() was given {columns:,} tokens and may decode {new:,} more, but memory="
                f" was planned for {texts}. {_AGAIN} length={columns + new}, or give fewer tokens"
                " or a smaller max_new_tokens."
            )
        self._check_decoded(new, columns + new)
        chunk, ids = self.plan.chosen.chunk, given.get("input_ids", given.get("inputs"))
        long = isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > chunk
        if long and given.get("prefill_chunk_size") is None:
            given["prefill_chunk_size"] = chunk

    def check(self, cache: EngineCache, given: dict[str, Any]) -> None:
        """Checks a forward pass before anything of it happens. Raises PlanError."""
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or cache.context.looks:
            return
        rows, new = tokens.shape[:2]
        self._check_rows(cache, rows)
        texts, columns = self.plan.texts, cache.columns_seen + new
        if columns > texts.length:
            raise PlanError(
                f"This pass brings its sequences to {columns:,} tokens, but memory= was planned for"
                f" {texts}. {_AGAIN} length={columns} or more."
            )
        if rows * new > texts.batch * self.plan.chosen.chunk:
            raise PlanError(
                f"{rows} × {new:,} tokens at once are more than the {texts.batch} ×"
                f" {self.plan.chosen.chunk:,} that memory= was planned for. generate() reads such"
                " prompts in parts by itself: leave prefill_chunk_size out; a loop of your own"
                " feeds them in parts."
            )
        if new == 1 and cache.columns_seen:
            decoded_B = cache.states[0].sequences.decoded.tokens_B
            self._check_decoded(int(decoded_B.max()) + 1 if len(decoded_B) else 1, columns)

    def _check_decoded(self, decoded: int, columns: int) -> None:
        """Raises PlanError where decoded tokens, which all stay, are more than was planned."""
        new = self.plan.texts.new
        if self._kept is None or decoded <= new or columns <= self._kept + new:
            return
        raise PlanError(
            f"{decoded:,} decoded tokens behind a prompt: memory= was planned for new_tokens={new},"
            f" and {self.plan.policy} keeps all of them. {_AGAIN} new_tokens={decoded}."
        )

    def _check_rows(self, cache: EngineCache, rows: int) -> None:
        """Raises PlanError where too many sequences are held at once, in all caches together."""
        most = self.plan.texts.batch
        self._caches.add(cache)
        if rows + self._others(cache) > most:
            gc.collect()  # caches that are gone may be part of a cycle
        others = self._others(cache)
        if rows + others > most:
            held = f", and other caches still hold {others}" if others else ""
            raise PlanError(
                f"{rows} sequences (beams and returned sequences count){held}, but memory= was"
                f" planned for batch={most}. {_AGAIN} batch={rows + others}, or drop the caches"
                " that you need no more."
            )

    def _others(self, cache: EngineCache) -> int:
        """Sequences of other caches that are alive."""
        return sum(max(0, x.batch_size) for x in self._caches if x is not cache and x.columns_seen)
