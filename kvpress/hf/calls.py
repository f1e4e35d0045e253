"""The `generate()` calls that are under way: their caches, and the rows that have met their end."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from kvpress.hf.cache import EngineCache


class EndedRows(StoppingCriteria):
    """Notes which rows of a batch have met their end. It stops nothing itself.

    `generate()` feeds such a row padding until the last one is done. ends: token ids that end a
    row. criteria: what else may end it, by transformers' own classes.
    """

    def __init__(self, ends: Sequence[int], criteria: Sequence[StoppingCriteria]) -> None:
        self._ends, self._criteria = list(ends), list(criteria)
        self._ended_B: Tensor | None = None
        self.padded_B: Tensor | None = None  # rows whose newest token is padding; None: no row's

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Looks at the newest tokens `[B, T]`; nobody is done for it."""
        self.padded_B = self._ended_B
        last_B = input_ids[:, -1]
        ends = torch.tensor(self._ends, dtype=last_B.dtype, device=last_B.device)
        self.add(torch.isin(last_B, ends))
        for criterion in self._criteria:
            self.add(criterion(input_ids, scores, **kwargs))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def add(self, done: Tensor | bool) -> None:
        """Notes what a criterion said of the newest tokens: bool `[B]`, or one for all."""
        before = self._ended_B
        if isinstance(done, Tensor):
            self._ended_B = done.clone() if before is None else before | done
        elif done and before is not None:
            self._ended_B = torch.ones_like(before)


class Heard(StoppingCriteria):
    """A criterion of the caller's own, which is asked once, and what it says noted."""

    def __init__(self, criterion: Any, rows: EndedRows) -> None:
        self._criterion, self._rows = criterion, rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """What the criterion says."""
        done = self._criterion(input_ids, scores, **kwargs)
        self._rows.add(done)
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_criterion"], name)


@dataclass
class Call:
    """One `generate()`.

    drafts: whether the tokens that it judges at once may be drafted. columns: of its prompt, which
    may be read in chunks; None: not known.
    """

    cache: EngineCache
    rows: EndedRows | None
    drafts: bool
    columns: int | None = None

    def begin(self, given: dict[str, Any]) -> Any:
        """Prepares the arguments of a pass. Returns the logits that drafts keep, if it has some."""
        self.mask(given)
        return given.get("logits_to_keep") if self.drafts else None

    def mask(self, given: dict[str, Any]) -> None:
        """Marks what rows that have met their end are fed as padding, in a pass's arguments.

        Such tokens then occupy nothing, are not scored and not attended. It reads one flag of the
        device per step, as `generate()` itself does.
        """
        tokens = given.get("input_ids")
        if self.rows is None or self.rows.padded_B is None or tokens is None:
            return
        padded_B = self.rows.padded_B
        if tokens.shape != (len(padded_B), 1):
            return
        if not bool(padded_B.any()):
            return
        real_BT = self.cache.ids.real()
        new_B1 = ~padded_B[:, None].to(real_BT.device)
        self.cache.ids.ended = True
        given["attention_mask"] = torch.cat([real_BT, new_B1], dim=1).long()


class Calls:
    """The calls of one engine under way, by thread, the innermost last."""

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def entered(self, call: Call) -> Iterator[None]:
        """The call is under way inside the block."""
        self._stack.append(call)
        try:
            yield
        finally:
            self._stack.pop()

    @property
    def any(self) -> bool:
        """Whether this thread is inside a `generate()`."""
        return bool(self._stack)

    def of(self, cache: EngineCache) -> Call | None:
        """The call of this thread that fills a cache."""
        return next((call for call in reversed(self._stack) if call.cache is cache), None)

    @property
    def _stack(self) -> list[Call]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[Call] = self._local.stack
        return stack


class Newest:
    """Which cache an engine shows when it is asked for none by name.

    That of the thread's last `generate()`, else of any thread's; before the first one, that of the
    newest forward pass. A cache that came later by a forward pass or `new_cache()` goes before it
    as long as somebody holds it: a pass that only scores a text replaces nothing.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._shared = _Shown()

    def generated(self, cache: EngineCache) -> None:
        """A `generate()` fills this cache."""
        for shown in (self._own, self._shared):
            shown.cache, shown.is_generated, shown.held = cache, True, None

    def passed(self, cache: EngineCache) -> None:
        """A cache was made otherwise."""
        for shown in (self._own, self._shared):
            if shown.is_generated:
                shown.held = weakref.ref(cache)
            else:
                shown.cache = cache

    def get(self) -> EngineCache | None:
        """The cache to show; None: there is none yet."""
        return self._own.get() or self._shared.get()

    @property
    def _own(self) -> _Shown:
        if not hasattr(self._local, "shown"):
            self._local.shown = _Shown()
        shown: _Shown = self._local.shown
        return shown


@dataclass
class _Shown:
    cache: EngineCache | None = None
    is_generated: bool = False
    held: weakref.ref[EngineCache] | None = None  # newer, while somebody else holds it

    def get(self) -> EngineCache | None:
        held = None if self.held is None else self.held()
        return self.cache if held is None else held
