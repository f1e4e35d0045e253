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
from kvpress.bench.quality.sample import Question, Sample, Writer
from kvpress.bench.quality.subject import Call, Subject, recording
from kvpress.bench.quality.suites import VISIBLE, Plan
from kvpress.bench.quality.tasks import TASKS
from torch import Tensor

FULL = "full"  # the policy that the others are compared with
BLIND = "no context"  # the floor: the questions alone


def evaluate(
    reference: Subject,
    subjects: Sequence[Subject],
    writer: Writer,
    plans: Sequence[Plan],
    results: Results,
    seed: int = 0,
    stepwise: bool = False,
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> None:
    """Runs every cell that the results do not hold yet. A cell that fails is kept with its error.

    reference: the full cache, with which answers are compared; it also answers without a context.
    It may be one of the subjects.
    """
    for plan in plans:
        for index in range(plan.samples):
            sample = _visible_as_planned(_sample(writer, plan, index, seed), plan)
            cell = Cell(plan.task, plan.tokens, index, plan.protocol, reference.name)
            _run_sample(reference, subjects, cell, sample, writer, results, stepwise, on_cell)


def _sample(writer: Writer, plan: Plan, index: int, seed: int) -> Sample:
    """The same for both protocols, and for every policy."""
    place = zlib.crc32(f"{plan.task} {plan.tokens} {index} {seed}".encode())
    return TASKS[plan.task].make(writer, random.Random(place), plan.tokens, index)


def _visible_as_planned(sample: Sample, plan: Plan) -> Sample:
    """With the question in the context, all but its last token, where it is to be visible."""
    if plan.protocol != VISIBLE:
        return sample
    question = sample.questions[0]
    context = (*sample.context, *question.prompt[:-1])
    return replace(
        sample, context=context, questions=(replace(question, prompt=question.prompt[-1:]),)
    )


class _Reading:
    """A context, read and asked about once, when somebody wants to know."""

    def __init__(
        self, subject: Subject, sample: Sample, stepwise: bool, known: _Reading | None = None
    ) -> None:
        self._subject, self._sample, self._stepwise = subject, sample, stepwise
        self._known = known  # another reading of the same context
        self.calls: list[Call] = []  # of the layers, where this is the first reading

    @functools.cached_property
    def answers(self) -> list[Tensor]:
        """The logits of every answer."""
        start = time.perf_counter()
        if self._known is None:
            with recording(self.calls):
                cache = self._subject.read(self._sample.context)
        else:
            cache = self._subject.read(self._sample.context, self._known.calls)
        self.bytes_held, self.bytes_full = self._subject.bytes(cache)
        logits = [self._subject.ask(cache, q, self._stepwise) for q in self._sample.questions]
        self.seconds = time.perf_counter() - start
        return logits


def _run_sample(
    reference: Subject,
    subjects: Sequence[Subject],
    empty: Cell,
    sample: Sample,
    writer: Writer,
    results: Results,
    stepwise: bool,
    on_cell: Callable[[Cell], None],
) -> None:
    """The cells of one sample; what the full cache answers is kept only for as long."""
    known = _Reading(reference, sample, stepwise)
    blind = replace(sample, context=writer.prefix)

    def reading_of(name: str) -> _Reading:
        if name == BLIND:
            return _Reading(reference, blind, stepwise)
        subject = by_name[name]
        return known if subject is reference else _Reading(subject, sample, stepwise, known)

    by_name = {subject.name: subject for subject in subjects}
    for name in (*by_name, BLIND):
        cell = replace(empty, policy=name, depth=sample.depth)
        if cell.key not in results:
            cell = _filled(cell, reading_of(name), known, sample)
            results.add(cell)
        on_cell(cell)


def _filled(cell: Cell, reading: _Reading, known: _Reading, sample: Sample) -> Cell:
    try:
        wanted = known.answers  # first: others take the recorded calls of this reading
        answers = zip(sample.questions, reading.answers, wanted, strict=True)
        scores = [_labelled(*answer) for answer in answers]
    except Exception as error:  # whatever a policy does wrong, the other cells go on
        return replace(cell, error=f"{type(error).__name__}: {error}")
    return replace(
        cell,
        scores=scores,
        bytes_held=reading.bytes_held,
        bytes_full=reading.bytes_full,
        seconds=round(reading.seconds, 3),
    )


def _labelled(question: Question, logits: Tensor, wanted: Tensor) -> dict[str, Any]:
    made = score(logits, question.answer, wanted)._asdict()
    return {
        "label": question.label,
        **{k: None if v is None else round(v, 6) for k, v in made.items()},
    }
