"""The requests that are served: each ends once, and what it held is free at once."""

from __future__ import annotations

from kvpress.batching.admission import Admission
from kvpress.batching.leaving import late, leaves
from kvpress.batching.stats import Counts
from kvpress.batching.text import Text
from kvpress.hf.feeding import Feeding


class Served:
    """Who is served, and who was put aside meanwhile.

    running: the texts that hold a cache, in the order in which they came.
    """

    def __init__(self, admission: Admission, counts: Counts, feeding: Feeding) -> None:
        self.running: list[Text] = []
        self._admission, self._counts, self._feeding = admission, counts, feeding

    def add(self, text: Text) -> None:
        """Counts a text among those that are served, and the bytes that were promised to it."""
        self._admission.reserving.promise(text.reserved)
        self.running.append(text)

    def resume(self, text: Text) -> None:
        """Takes a text back that was put aside."""
        self._bring_back(text)
        try:
            text.resume(self._admission.parking)
        except Exception as error:
            self.fail(text, error)

    def drop_ended(self) -> None:
        """Ends what was cancelled, or took longer than it may."""
        for text in [x for x in self._admission.aside if leaves(x.handle)]:
            self._bring_back(text)
            text.forget(self._admission.parking)
        for text in [x for x in self.running if leaves(x.handle)]:
            if text.handle.is_cancelled:
                self.end(text, "cancelled")
            else:
                self.fail(text, late(text.handle))

    def end(self, text: Text, reason: str) -> None:
        """Ends a text."""
        self._leave(text)
        if reason == "cancelled":
            self._counts.cancelled += 1
        else:
            self._counts.finished += 1
        text.end(reason)

    def fail(self, text: Text, error: Exception) -> None:
        """Ends a text that failed."""
        self._leave(text)
        self._counts.failed += 1
        text.fail(error)

    def fail_all(self, error: Exception) -> None:
        """Ends all of them, those that were put aside as well."""
        for text in list(self._admission.aside):
            self._bring_back(text)
            text.forget(self._admission.parking)
        for text in list(self.running):
            self.fail(text, error)

    def _bring_back(self, text: Text) -> None:
        if text in self._admission.aside:
            self._admission.aside.remove(text)
        self.add(text)

    def _leave(self, text: Text) -> None:
        self.running.remove(text)
        self._feeding.forget()  # what is held is free at once, not with the next step
        self._admission.reserving.give_back(text.reserved)
