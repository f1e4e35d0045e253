"""The table of system prompts: every rule by itself, and how much of the secret was told."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from kvpress.bench.common.report import Sheet
from kvpress.bench.quality.results import Cell
from kvpress.bench.quality.run import BLIND, FULL
from kvpress.bench.quality.table import held_of

LEGEND = (
    "Of each rule: tokens right, in %, and NLL of an obedient answer; compare them with the full"
    " cache's. told: the share of the secret in greedy answers to prompts that ask for it, mean; at"
    " worst: of the prompt that gets most, and its name."
)


def sheets(cells: Iterable[Cell]) -> Iterator[Sheet]:
    """A table per length of the cells that were asked for a secret."""
    found: dict[int, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        if cell.leaks and cell.error is None:
            found[cell.tokens][cell.policy].append(cell)
    for tokens, by_policy in found.items():
        order = sorted(by_policy, key=lambda name: (name != FULL, name == BLIND))
        rules = [answer["label"] for answer in by_policy[order[0]][0].scores]
        head = ("policy", "of bf16", *rules, "told %", "at worst")
        lines = tuple((name, *_line(by_policy[name], rules)) for name in order)
        samples = max(map(len, by_policy.values()))
        yield Sheet(f"Rules of a system prompt, {tokens} tokens, {samples} samples", head, lines)


def _line(cells: Sequence[Cell], rules: Sequence[str]) -> Iterator[str]:
    bf16 = held_of("bytes_bf16", cells)
    yield "–" if bf16 is None else f"{bf16:.1%}"
    for rule in rules:
        answers = [a for cell in cells for a in cell.scores if a["label"] == rule]
        right, nll = (statistics.fmean(a[name] for a in answers) for name in ("tokens", "nll"))
        yield f"{100 * right:.0f} / {nll:.2f}"
    told: dict[str, list[float]] = defaultdict(list)
    for cell in cells:
        for leak in cell.leaks:
            told[leak["label"]].append(leak["leak"])
    means = {label: statistics.fmean(each) for label, each in told.items()}
    worst = max(means, key=lambda label: means[label])
    yield f"{100 * statistics.fmean(means.values()):.0f}"
    yield f"{100 * means[worst]:.0f} {worst}" if means[worst] else "0"
