"""The tables: one per task, length and protocol; one line per policy, with intervals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvpress.bench.common.report import Sheet
from kvpress.bench.quality.reads import Share, share_of
from kvpress.bench.quality.results import Cell
from kvpress.bench.quality.run import BLIND, FULL
from kvpress.bench.quality.stats import Estimate, estimate
from kvpress.bench.quality.tasks import LM_EVAL, Metric

HEAD = (
    *("policy", "kept", "of bf16", "read", "tokens read", "missed", "score %", "worst"),
    *("generated", "vs full", "NLL", "KL", "agree"),
)
# Columns shown where they say something.
OPTIONAL = frozenset({"of bf16", "read", "tokens read", "missed", "worst", "generated"})
LEGEND = (
    "kept: bytes held, of those of the full cache; of bf16: of those of a full cache in bfloat16."
    " read: bytes read per decode step, of those of the full cache: all that is held, or pages and"
    " what they are chosen by; tokens read: of a row of layers that choose. missed: the share of"
    " attention that a query head may have missed at the most, mean (largest)."
    " score: answers of which every token is right, [95 % bootstrap over contexts]. worst: the same"
    " of the worst question of each context. generated: the same of answers that were decoded."
    " vs full: paired, in points. NLL: nats per token of the right answer. KL, agree: next-token"
    " distribution and first choice beside the full cache. no context: the questions alone, the"
    " floor."
)
DISCRIMINATES = 0.5  # what the full cache must reach, at least, for a task to tell policies apart


@dataclass(frozen=True)
class Line:
    """One policy on one task. difference: from the full cache, sample by sample.

    kept: bytes held, as a fraction of those of the full cache; bf16: of one in bfloat16. worst: of
    the questions of each context. generated: of decoded answers, where there are any. reads: of
    decode steps that read some pages only. read: bytes read per step, as a fraction of the full
    cache's, where a policy beside this one reads less than it holds.
    """

    policy: str
    score: Estimate | None
    difference: Estimate | None
    nll: Estimate | None
    kl: float | None
    agreement: float | None
    kept: float | None
    errors: tuple[str, ...] = ()
    bf16: float | None = None
    worst: float | None = None
    generated: Estimate | None = None
    reads: Share | None = None
    read: float | None = None


@dataclass(frozen=True)
class Block:
    """All policies on one task at one length under one protocol."""

    task: str
    tokens: int
    protocol: str
    metric: Metric
    asks: bool
    lines: tuple[Line, ...]

    @property
    def discriminates(self) -> bool:
        """Whether the full cache solves the task, so that its score says something."""
        full = next((line.score for line in self.lines if line.policy == FULL), None)
        return full is None or full.mean >= DISCRIMINATES or self.metric == "tokens"


def blocks(cells: Iterable[Cell]) -> Iterator[Block]:
    """The cells in tables, in their order; those of lm-eval have a table of their own."""
    grouped: dict[tuple[str, int, str], dict[str, list[Cell]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for cell in (cell for cell in cells if cell.metric != LM_EVAL):
        grouped[cell.task, cell.tokens, cell.protocol][cell.policy].append(cell)
    for (task, tokens, protocol), by_policy in grouped.items():
        full = {cell.index: cell for cell in by_policy.get(FULL, ()) if cell.error is None}
        order = sorted(by_policy, key=lambda name: (name != FULL, name == BLIND))
        any_cell = by_policy[order[0]][0]  # all of them say the same of their task
        metric, asks = any_cell.metric, any_cell.asks
        lines = [_line(name, by_policy[name], full, metric) for name in order]
        yield Block(task, tokens, protocol, metric, asks, tuple(_with_reads(lines)))


def _with_reads(lines: Sequence[Line]) -> Iterator[Line]:
    """What every policy reads per step, where one of them does not read all that it holds."""
    chooses = any(line.reads for line in lines)
    for line in lines:
        everything = line.kept if chooses else None
        yield replace(line, read=line.reads.read if line.reads else everything)


def _line(policy: str, cells: list[Cell], full: dict[int, Cell], metric: Metric) -> Line:
    good = [cell for cell in cells if cell.error is None]
    errors = tuple(dict.fromkeys(cell.error for cell in cells if cell.error is not None))
    if not good:
        return Line(policy, None, None, None, None, None, None, errors)
    pairs = [
        _mean(cell, metric) - _mean(full[cell.index], metric) for cell in good if cell.index in full
    ]
    decoded = [_mean(cell, f"generated_{metric}") for cell in good if _is_generated(cell)]
    return Line(
        policy,
        estimate([_mean(cell, metric) for cell in good]),
        estimate(pairs) if pairs and policy != FULL else None,
        estimate([_mean(cell, "nll") for cell in good]),
        statistics.fmean(_mean(cell, "kl") for cell in good),
        statistics.fmean(_mean(cell, "agreement") for cell in good),
        held_of("bytes_full", good),
        errors,
        held_of("bytes_bf16", good),
        statistics.fmean(min(answer[metric] for answer in cell.scores) for cell in good)
        if any(len(cell.scores) > 1 for cell in good)
        else None,
        estimate(decoded) if decoded else None,
        reads_of(good),
    )


def held_of(whole: str, cells: Sequence[Cell]) -> float | None:
    """Bytes held, as a fraction of `bytes_full` or `bytes_bf16`; None where they are not known."""
    held = sum(cell.bytes_held for cell in cells)
    total: int = sum(getattr(cell, whole) for cell in cells)
    return held / total if total and all(cell.policy != BLIND for cell in cells) else None


def reads_of(cells: Sequence[Cell]) -> Share | None:
    """What steps read, of what the full cache holds; None where they read everything."""
    return share_of([cell.reads for cell in cells], sum(cell.bytes_full for cell in cells))


def _is_generated(cell: Cell) -> bool:
    return all("generated_exact" in answer for answer in cell.scores)


def _mean(cell: Cell, name: str) -> float:
    return statistics.fmean(answer[name] for answer in cell.scores)


def sheets(cells: Iterable[Cell]) -> Iterator[Sheet]:
    """The tables in texts."""
    for block in blocks(cells):
        samples = max((line.score.samples for line in block.lines if line.score), default=0)
        title = f"{block.task}, {block.tokens} tokens, {samples} samples"
        if block.asks:
            title += f", question {block.protocol} while compressing"
        lines = [cells_of(line) for line in block.lines]
        shown = [
            place
            for place, name in enumerate(HEAD)
            if name not in OPTIONAL or any(line[place] != "–" for line in lines)
        ]
        head, *texts = (tuple(line[place] for place in shown) for line in (HEAD, *lines))
        yield Sheet(title, head, tuple(texts), tuple(notes_of(block)))


def notes_of(block: Block) -> list[str]:
    """What a reader of a table must know: what the score is, what failed, what says nothing."""
    notes = [f"{line.policy}: {error}" for line in block.lines for error in line.errors]
    if block.metric == "tokens":
        notes.append("The score is the share of right tokens.")
    if not block.discriminates:
        notes.append("Not discriminating: the full cache fails this task. Compare the NLL.")
    return notes


def cells_of(line: Line) -> tuple[str, ...]:
    """The texts of a line, under `HEAD`."""
    if line.score is None:
        return (line.policy, *("failed" if name == "score %" else "–" for name in HEAD[1:]))
    return (
        line.policy,
        _text(line.kept, ".1%"),
        _text(line.bf16, ".1%"),
        _text(line.read, ".1%"),
        f"{line.reads.tokens:,.0f}" if line.reads else "–",
        line.reads.missed if line.reads else "–",
        str(line.score),
        "–" if line.worst is None else f"{100 * line.worst:.0f}",
        str(line.generated or "–"),
        str(line.difference or "–"),
        _text(line.nll and line.nll.mean, ".2f"),
        _text(line.kl, ".2f"),
        _text(line.agreement, ".0%"),
    )


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
