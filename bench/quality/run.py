"""The evaluation itself: every sample is read once by every policy, and asked all its questions."""

from __future__ import annotations

import functools
import random
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kvpress.bench.quality.metrics import score
from kvpress.bench.quality.results import Cell, Results
from kvpress.bench.quality.sample import Question, Sample, TaskError, Writer
from kvpress.bench.quality.suites import VISIBLE, Plan
from kvpress.bench.quality.system import Call, System, recording
from torch import Tensor

FULL = "full"  # the policy that the others are compared with
BLIND = "no context"  # the floor: the questions alone


def evaluate(
    reference: System,
    systems: Sequence[System],
    writer: Writer,
    plans: Sequence[Plan],
    results: Results,
    seed: int = 0,
    stepwise: bool = False,
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> None:
    """Runs every cell that the results do not hold yet. A cell that fails is kept with its error.

    reference: the full cache, with which answers are compared; it also answers without a context.
    It may be one of the systems.
    """
    names = (*(system.name for system in systems), BLIND)
    for plan in plans:
        for index in range(plan.samples):
            fill = _filler(reference, systems, writer, plan, index, seed, stepwise)
            for name in names:
                cell = _empty(plan, index, name)
                if cell.key not in results:
                    cell = fill(cell)
                    results.add(cell)
                on_cell(cell)
            del fill  # and with it what the layers handed over, before the next context is read


def _empty(plan: Plan, index: int, policy: str) -> Cell:
    return Cell(
        plan.task.name,
        plan.tokens,
        index,
        plan.protocol,
        policy,
        metric=plan.task.metric,
        asks=plan.task.asks,
    )


def _sample(writer: Writer, plan: Plan, index: int, seed: int) -> Sample:
    """The same for both protocols, and for every policy. Raises TaskError."""
    place = zlib.crc32(f"{plan.task.name} {plan.tokens} {index} {seed}".encode())
    sample = plan.task.make(writer, random.Random(place), plan.tokens, index)
    return _visible(sample) if plan.protocol == VISIBLE else sample


def _visible(sample: Sample) -> Sample:
    """With the question in the context, all but its last token."""
    question = sample.questions[0]
    context = (*sample.context, *question.prompt[:-1])
    return replace(
        sample, context=context, questions=(replace(question, prompt=question.prompt[-1:]),)
    )


class _Reading:
    """A context, read and asked about once, when somebody wants to know."""

    def __init__(
        self, system: System, sample: Sample, stepwise: bool, known: _Reading | None = None
    ) -> None:
        self._system, self._sample, self._stepwise = system, sample, stepwise
        self._known = known  # another reading of the same context
        self.calls: list[Call] = []  # of the layers, where this is the first reading

    @functools.cached_property
    def answers(self) -> list[Tensor]:
        """The logits of every answer."""
        start = time.perf_counter()
        if self._known is None:
            with recording(self.calls):
                cache = self._system.read(self._sample.context)
        else:
            cache = self._system.read(self._sample.context, self._known.calls)
        self.bytes_held, self.bytes_full = self._system.bytes(cache)
        logits = [self._system.ask(cache, q, self._stepwise) for q in self._sample.questions]
        self.seconds = time.perf_counter() - start
        return logits


def _filler(
    reference: System,
    systems: Sequence[System],
    writer: Writer,
    plan: Plan,
    index: int,
    seed: int,
    stepwise: bool,
) -> Callable[[Cell], Cell]:
    """What fills the cells of one sample; it keeps what the full cache answers."""
    try:
        sample = _sample(writer, plan, index, seed)
    except TaskError as error:  # the other samples go on
        return functools.partial(_failed, error=error)
    by_name = {system.name: system for system in systems}
    known = _Reading(reference, sample, stepwise)
    blind = replace(sample, context=writer.prefix)

    def fill(cell: Cell) -> Cell:
        if cell.policy == BLIND:
            reading = _Reading(reference, blind, stepwise)
        elif by_name[cell.policy] is reference:
            reading = known
        else:
            reading = _Reading(by_name[cell.policy], sample, stepwise, known)
        return _filled(replace(cell, depth=sample.depth), reading, known, sample)

    return fill


def _filled(cell: Cell, reading: _Reading, known: _Reading, sample: Sample) -> Cell:
    try:
        wanted = known.answers  # first: others take the recorded calls of this reading
        answers = zip(sample.questions, reading.answers, wanted, strict=True)
        scores = [_labelled(*answer) for answer in answers]
    except Exception as error:  # whatever a policy does wrong, the other cells go on
        return _failed(cell, error)
    return replace(
        cell,
        scores=scores,
        bytes_held=reading.bytes_held,
        bytes_full=known.bytes_full,
        seconds=round(reading.seconds, 3),
    )


def _failed(cell: Cell, error: Exception) -> Cell:
    return replace(cell, error=f"{type(error).__name__}: {error}")


def _labelled(question: Question, logits: Tensor, wanted: Tensor) -> dict[str, Any]:
    made = score(logits, question.answer, wanted)._asdict()
    return {
        "label": question.label,
        **{k: None if v is None else round(v, 6) for k, v in made.items()},
    }
