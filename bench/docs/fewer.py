"""What survives at compressions asked for: tables of all `quality-heads*` files there are.

Every file is one run; a section is one length of it. Scores are `bench/quality/summary.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kvpress.bench.common.models import known_as
from kvpress.bench.common.report import Sheet
from kvpress.bench.docs import record_heads
from kvpress.bench.docs.tables import RESULTS, code, percent, table
from kvpress.bench.quality import instructions_table, summary
from kvpress.bench.quality import table as evaluation
from kvpress.bench.quality.plots import family
from kvpress.bench.quality.results import Cell, load
from kvpress.bench.quality.run import BLIND, FULL
from kvpress.bench.quality.summary import Group, Standing

PATTERN = "quality-heads*.jsonl*"
GIVEN = "as given"  # the column of what took no ratio


class Section(NamedTuple):
    """One length of one run. cells: of that length and protocol."""

    settings: dict[str, Any]
    group: Group
    cells: list[Cell]

    @property
    def title(self) -> str:
        """Length, protocol, model, stored dtype, and whether the system prompt was protected."""
        stored = self.settings.get("cache_dtype") or self.settings.get("dtype")
        asked = f"question {self.group.protocol}"
        model = known_as(str(self.settings.get("model")))
        spared = ", system prompt protected" if self.settings.get("protect_system") else ""
        sought = ", budgets by bytes" if self.settings.get("by_bytes") else ""
        return f"{self.group.tokens:,} tokens, {asked}, {model}, stored in {stored}{spared}{sought}"

    @property
    def ratios(self) -> list[float]:
        """Those that were asked for, the smallest first."""
        return sorted({s.ratio for s in self.group.standings if s.ratio is not None})

    def by_ratio(self) -> dict[str, dict[float | None, Standing]]:
        """The standings of every family of policies, by what was asked of them."""
        found: dict[str, dict[float | None, Standing]] = {}
        for made in self.group.standings:
            name = made.policy if made.ratio is None else family(made.policy)
            found.setdefault(name, {})[made.ratio] = made
        return found


def sections(folder: Path = RESULTS) -> list[Section]:
    """What is recorded, by length."""
    names = sorted({path.name.removesuffix(".gz") for path in folder.glob(PATTERN)})
    made = []
    for results in (load(folder / name) for name in names):
        for group in summary.groups(results):
            cells = [c for c in results if (c.tokens, c.protocol) == (group.tokens, group.protocol)]
            made.append(Section(results.settings, group, cells))
    return sorted(made, key=lambda section: section.group.tokens)


def page(folder: Path = RESULTS) -> str:
    """The picture and all tables, in Markdown; a sentence where nothing is recorded."""
    found = sections(folder)
    if not found:
        return "Nothing is recorded yet: run the commands below."
    parts = ["![Right tokens against bytes held](pictures/fewer.svg)"]
    for section in found:
        parts += [f"**{section.title}**. {_solved(section.group)}", overview(section, "solved")]
        parts += list(summary.gaps(section.group))
        if any(made.generated for made in section.group.standings):
            parts += ["Decoded answers, by tokens right at their place:"]
            parts += [overview(section, "generated")]
        if section.ratios:
            parts += [
                f"Task by task at {section.ratios[0]:g}:1, tokens right in %:",
                tasks(section),
            ]
        for sheet in instructions_table.sheets(section.cells):
            parts += ["Rules of a system prompt, tokens right and NLL:", _markdown(sheet)]
    return "\n\n".join(parts)


def _solved(group: Group) -> str:
    return f"The full cache solves {', '.join(group.solved) or 'no task'}."


def overview(section: Section, shows: str) -> str:
    """A line per family, a column per ratio: score over the tasks, and bytes of a bf16 cache."""
    ratios: list[float | None] = [*section.ratios]
    found = section.by_ratio()
    if any(None in of for of in found.values()):
        ratios.append(None)
    rows = [
        [_named(name), *(_standing(of.get(ratio), shows) for ratio in ratios)]
        for name, of in found.items()
    ]
    return table(["", *(GIVEN if ratio is None else f"{ratio:g}:1" for ratio in ratios)], rows)


def _standing(made: Standing | None, shows: str) -> str:
    score = None if made is None else getattr(made, shows)
    if made is None or score is None:
        return "–"
    return f"{score}" if made.bf16 is None else f"{score} at {percent(made.bf16, 1)}"


def tasks(section: Section) -> str:
    """A line per policy at the smallest ratio, and per policy without one; a column per task."""
    least = section.ratios[0]
    tokens = [replace(cell, metric="tokens") for cell in section.cells if cell.error is None]
    found = {
        block.task: {line.policy: line for line in block.lines}
        for block in evaluation.blocks(tokens)
    }
    rows = [
        [_named(made.policy), *(_right(of.get(made.policy)) for of in found.values())]
        for made in section.group.standings
        if made.ratio in (least, None)
    ]
    return table(["", *found], rows)


def _right(line: evaluation.Line | None) -> str:
    return "–" if line is None or line.score is None else str(line.score)


def _named(policy: str) -> str:
    return policy if policy == BLIND else code(policy)


def _markdown(sheet: Sheet) -> str:
    rows: Iterator[Sequence[str]] = ([_named(line[0]), *line[1:]] for line in sheet.lines)
    return table(["", *sheet.head[1:]], rows)


def curves(section: Section) -> dict[str, list[tuple[float, float]]]:
    """Bytes held, of a bf16 cache's, and the score over the tasks, by family; not of full."""
    found = {}
    for name, of in section.by_ratio().items():
        points = [
            (made.bf16, made.solved.mean)
            for made in of.values()
            if made.bf16 is not None and made.solved is not None
        ]
        if points and name not in (FULL, BLIND):
            found[name] = sorted(points)
    return found


def heads() -> str:
    """The picture of budgets per head, where they are recorded."""
    if not record_heads.PATH.exists():
        return "Budgets per head are not recorded yet."
    return f"![The budget of every head: {record_heads.read().policy}](pictures/heads.svg)"


PARTS: Mapping[str, Callable[[], str]] = {"quality-fewer": page, "quality-per-head": heads}
