"""The score over tasks: how much of what the full cache gets right a policy gets right."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvpress.bench.common.report import Sheet
from kvpress.bench.quality.results import Cell
from kvpress.bench.quality.run import BLIND, FULL
from kvpress.bench.quality.stats import Estimate, ratio_of_means
from kvpress.bench.quality.table import held_of, reads_of
from kvpress.bench.quality.tasks import LM_EVAL

SOLVED = 0.8  # tokens that the full cache gets right, at least, of a task that it solves
_NAMES = "policy", "asked", "of bf16", "read of bf16", "solved %", "generated %", "all %"
HEAD: tuple[str, ...] = _NAMES
_READ = HEAD.index("read of bf16")  # shown where a policy reads less than it holds
LEGEND = (
    "solved: tokens right, in % of the full cache's, mean over the tasks that it solves: of whose"
    f" tokens it gets {SOLVED:.0%} or more right at this length; [95 % bootstrap over contexts]."
    " generated: the same of answers that were decoded, by tokens right at their place. all: over"
    " all tasks. asked: the compression that was asked for; of bf16: bytes really held, of those of"
    " a full cache in bfloat16; read of bf16: of these, bytes read per decode step."
)
_Cells = Mapping[str, Sequence[Cell]]  # task -> cells of one policy


@dataclass(frozen=True)
class Standing:
    """A policy over tasks. Scores are fractions of the full cache's.

    missing: tasks of which no context could be compared; partial: those of which some could not.
    bf16: bytes held, of a bfloat16 cache's; read: bytes read per decode step, if not all of them.
    """

    policy: str
    ratio: float | None
    bf16: float | None
    solved: Estimate | None
    generated: Estimate | None
    all: Estimate | None
    missing: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    read: float | None = None


@dataclass(frozen=True)
class Group:
    """All policies on the tasks of one length under one protocol. solved: those of full's tasks."""

    tokens: int
    protocol: str
    tasks: tuple[str, ...]
    solved: tuple[str, ...]
    standings: tuple[Standing, ...]


def groups(cells: Iterable[Cell]) -> Iterator[Group]:
    """The cells by length and protocol, where the full cache is among them."""
    found: dict[tuple[int, str], dict[str, dict[str, list[Cell]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for cell in cells:
        if cell.metric != LM_EVAL and cell.error is None and cell.scores:
            found[cell.tokens, cell.protocol][cell.policy][cell.task].append(cell)
    for (tokens, protocol), by_policy in found.items():
        full = by_policy.get(FULL)
        if full is None:
            continue
        solved = tuple(task for task, own in full.items() if _right(own, "tokens") >= SOLVED)
        order = sorted(by_policy, key=lambda name: (name != FULL, name == BLIND))
        made = tuple(_standing(name, by_policy[name], full, solved) for name in order)
        yield Group(tokens, protocol, tuple(full), solved, made)


def _standing(policy: str, own: _Cells, full: _Cells, solved: Sequence[str]) -> Standing:
    every = [cell for task in full for cell in own.get(task, ())]
    compared = {task: len(_pairs(own, full, task, "tokens")) for task in full}
    return Standing(
        policy,
        next((cell.ratio for cell in every), None),
        held_of("bytes_bf16", every),
        _score(own, full, solved, "tokens"),
        _score(own, full, solved, "generated_tokens"),
        _score(own, full, list(full), "tokens"),
        tuple(task for task, count in compared.items() if not count),
        tuple(task for task, count in compared.items() if 0 < count < len(full[task])),
        _read(every),
    )


def _read(cells: Sequence[Cell]) -> float | None:
    """Bytes read per decode step, of a bfloat16 cache's; None where all that is held is read."""
    share, bf16 = reads_of(cells), sum(cell.bytes_bf16 for cell in cells)
    return share.read * sum(cell.bytes_full for cell in cells) / bf16 if share and bf16 else None


def _score(own: _Cells, full: _Cells, tasks: Sequence[str], name: str) -> Estimate | None:
    """None without a task, and where one of them is missing: means of others would mislead."""
    pairs = [_pairs(own, full, task, name) for task in tasks]
    if not pairs or not all(pairs) or not any(below for each in pairs for _, below in each):
        return None
    return ratio_of_means(pairs)


def _pairs(own: _Cells, full: _Cells, task: str, name: str) -> list[tuple[float, float]]:
    """What the policy and the full cache got right of the same contexts."""
    theirs = {cell.index: cell for cell in full[task]}
    both = [(cell, theirs[cell.index]) for cell in own.get(task, ()) if cell.index in theirs]
    if not all(name in answer for pair in both for cell in pair for answer in cell.scores):
        return []
    return [(_right([a], name), _right([b], name)) for a, b in both]


def _right(cells: Sequence[Cell], name: str) -> float:
    return statistics.fmean(
        statistics.fmean(answer[name] for answer in cell.scores) for cell in cells
    )


def sheets(cells: Iterable[Cell]) -> Iterator[Sheet]:
    """A table per length and protocol, where there is more than one task to sum up."""
    for group in groups(cells):
        if len(group.tasks) < 2:
            continue
        whole = [HEAD, *map(_texts, group.standings)]
        if not any(standing.read for standing in group.standings):
            whole = [(*line[:_READ], *line[_READ + 1 :]) for line in whole]
        notes = (f"Solved by the full cache: {', '.join(group.solved) or 'none'}.", *gaps(group))
        title = f"All tasks, {group.tokens} tokens, question {group.protocol} while compressing"
        yield Sheet(title, whole[0], tuple(whole[1:]), notes)


def gaps(group: Group) -> Iterator[str]:
    """Which scores are of less than the full cache's are."""
    for standing in group.standings:
        if standing.missing:
            yield f"{standing.policy}: not measured on {', '.join(standing.missing)}."
        if standing.partial:
            yield f"{standing.policy}: some contexts are missing of {', '.join(standing.partial)}."


def _shown(standing: Standing) -> float | None:
    return standing.bf16 if standing.read is None else standing.read


def _texts(standing: Standing) -> tuple[str, ...]:
    return (
        standing.policy,
        "–" if standing.ratio is None else f"{standing.ratio:g}:1",
        *("–" if x is None else f"{x:.1%}" for x in (standing.bf16, _shown(standing))),
        *(str(x or "–") for x in (standing.solved, standing.generated, standing.all)),
    )
