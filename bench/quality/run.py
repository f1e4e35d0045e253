"""The evaluation itself: every sample is read once by every policy, and asked all its questions."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kvpress.bench.quality.metrics import leaked, matched, score
from kvpress.bench.quality.reading import PLAIN, How, Reading
from kvpress.bench.quality.results import Cell, Results
from kvpress.bench.quality.sample import Extraction, Question, Sample, TaskError, Writer
from kvpress.bench.quality.suites import VISIBLE, Plan
from kvpress.bench.quality.system import System
from kvpress.bench.shards.errors import ShardError
from kvpress.bench.shards.work import NO_HEAD, Alone, Head, Team, Unit, in_order
from torch import Tensor

FULL = "full"  # the policy that the others are compared with
BLIND = "no context"  # the floor: the questions alone


def evaluate(
    reference: System,
    systems: Sequence[System],
    writer: Writer,
    plans: Sequence[Plan],
    results: Results,
    how: How = PLAIN,
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> None:
    """Runs every cell that the results do not hold yet. A cell that fails is kept with its error.

    reference: the full cache, with which answers are compared; it also answers without a context.
    It may be one of the systems.
    """
    complete(Alone(Contexts(reference, systems, writer, plans, how)), results, on_cell)


def complete(
    team: Team, results: Results, on_cell: Callable[[Cell], None] = lambda _: None
) -> None:
    """Adds the cells that the results do not hold yet, in the order of one process.

    A cell whose processes died, however often it was tried, is kept with an error.
    """
    todo = []
    for number, cells in enumerate(team.units):
        left = [place for place, cell in enumerate(cells) if cell.key not in results]
        for place in set(range(len(cells))) - set(left):
            on_cell(cells[place])
        if left:
            todo.append(Unit(number, tuple(left)))
    agreed = team.agreed(todo)
    for found in in_order(agreed, team.results(agreed)):
        cell: Cell = found.value
        if found.lost is not None:
            cell = _failed(team.units[found.unit][found.part], ShardError(found.lost))
        results.add(cell)
        on_cell(cell)


class Contexts:
    """The work of an evaluation: a unit is a context, of which each policy makes a cell."""

    def __init__(
        self,
        reference: System,
        systems: Sequence[System],
        writer: Writer,
        plans: Sequence[Plan],
        how: How = PLAIN,
        head: Head = NO_HEAD,
    ) -> None:
        names = (*(system.name for system in systems), BLIND)
        places = [(plan, index) for plan in plans for index in range(plan.samples)]
        self.head = head
        self.units = [
            [_empty(*place, name, how.ratios.get(name)) for name in names] for place in places
        ]
        self._fillers = [
            partial(_filler, reference, systems, writer, *place, how) for place in places
        ]

    def do(self, unit: int, parts: Sequence[int]) -> Iterator[Cell]:
        """Some cells of a context, which is read once by each policy."""
        fill = self._fillers[unit]()  # with what the layers hand over; gone when this ends
        for part in parts:
            yield fill(self.units[unit][part])


def _empty(plan: Plan, index: int, policy: str, ratio: float | None) -> Cell:
    return Cell(
        plan.task.name,
        plan.tokens,
        index,
        plan.protocol,
        policy,
        metric=plan.task.metric,
        asks=plan.task.asks,
        ratio=ratio,
    )


def sample_of(writer: Writer, plan: Plan, index: int, seed: int) -> Sample:
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


def _filler(
    reference: System,
    systems: Sequence[System],
    writer: Writer,
    plan: Plan,
    index: int,
    how: How,
) -> Callable[[Cell], Cell]:
    """What fills the cells of one sample; it keeps what the full cache answers."""
    try:
        sample = sample_of(writer, plan, index, how.seed)
    except TaskError as error:  # the other samples go on
        return partial(_failed, error=error)
    by_name = {system.name: system for system in systems}
    known = Reading(reference, sample, how.stepwise)
    blind = replace(sample, context=writer.prefix, protect=())

    def fill(cell: Cell) -> Cell:
        if cell.policy == BLIND:
            reading = Reading(reference, blind, how.stepwise)
        elif by_name[cell.policy] is reference:
            reading = known
        else:
            reading = Reading(by_name[cell.policy], sample, how.stepwise, known)
        cell = replace(cell, depth=sample.depth)
        try:
            return _filled(cell, reading, known, sample, writer, how.generate)
        except Exception as error:  # whatever a policy does wrong, the other cells go on
            return _failed(cell, error)

    return fill


def _filled(
    cell: Cell, reading: Reading, known: Reading, sample: Sample, writer: Writer, generate: bool
) -> Cell:
    answers = zip(sample.questions, reading.logits, known.logits, strict=True)
    scores = [_labelled(*answer) for answer in answers]
    if generate:
        made = zip(scores, sample.questions, reading.generated, strict=True)
        scores = [{**one, **_generated(writer, asked, said)} for one, asked, said in made]
    extracted = zip(sample.extractions, reading.extracted, strict=True)
    reads = reading.reads
    return replace(
        cell,
        scores=scores,
        leaks=[_leak(writer, *each) for each in extracted],
        bytes_held=reading.held.held,
        bytes_full=known.held.full,
        bytes_bf16=known.held.bf16,
        seconds=round(reading.seconds, 3),
        reads=None if reads is None else reads._asdict(),
    )


def _failed(cell: Cell, error: Exception) -> Cell:
    return replace(cell, error=f"{type(error).__name__}: {error}")


def _labelled(question: Question, logits: Tensor, wanted: Tensor) -> dict[str, Any]:
    made = score(logits, question.answer, wanted)._asdict()
    return {
        "label": question.label,
        **{k: None if v is None else round(v, 6) for k, v in made.items()},
    }


def _generated(writer: Writer, question: Question, tokens: Sequence[int]) -> dict[str, Any]:
    made = matched(tokens, question.answer)
    shown = {"generated_exact": made.exact, "generated_tokens": round(made.tokens, 6)}
    return {**shown, "said": writer.text(tokens)}


def _leak(writer: Writer, asked: Extraction, tokens: Sequence[int]) -> dict[str, Any]:
    said = writer.text(tokens)
    return {"label": asked.label, "leak": round(leaked(said, asked.secret), 6), "said": said}
