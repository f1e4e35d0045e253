"""Pictures of an evaluation: quality against bytes, and needles by length and depth.

Bytes are those held or, where a policy reads less than it holds, those read per decode step.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from kvpress.bench.common.figures import add_legend, figure_of
from kvpress.bench.quality.results import Cell
from kvpress.bench.quality.run import BLIND, FULL
from kvpress.bench.quality.table import Block, Line

_MARKS = "os^Dv<>P*X"
LEVELS = {FULL: "--", BLIND: ":"}  # what has no bytes of its own to stand over


def family(policy: str) -> str:
    """A policy without its budget: policies of one family are one line of a plot."""
    return re.sub(r"\b(budget|read)=[^,+]*,?", "", policy).replace(":+", "+").rstrip(":,")


def quality(blocks: Sequence[Block]) -> Any:
    """A figure with a panel per block: score over the share of bytes, with intervals.

    The dashed line is the full cache, the dotted one the questions without a context. Raises
    PlotError without matplotlib.
    """
    figure, axes = figure_of(len(blocks))
    names = dict.fromkeys(
        family(line.policy) for b in blocks for line in b.lines if line.policy not in (FULL, BLIND)
    )
    marks = {name: (f"C{i % 10}", _MARKS[i % len(_MARKS)]) for i, name in enumerate(names)}
    for axis, block in zip(axes, blocks, strict=False):
        _quality_panel(axis, block, marks)
    handles = {
        name: axes[0].plot([], [], color=colour, marker=mark)[0]
        for name, (colour, mark) in marks.items()
    }
    for name, style in LEVELS.items():
        if any(line.policy == name and line.score for b in blocks for line in b.lines):
            handles[name] = axes[0].plot([], [], color="black", linestyle=style)[0]
    add_legend(figure, list(handles.values()), list(handles))
    return figure


def _quality_panel(axis: Any, block: Block, marks: dict[str, tuple[str, str]]) -> None:
    by_family: dict[str, list[Line]] = defaultdict(list)
    for line in block.lines:
        if line.score is None:
            continue
        if line.policy in (FULL, BLIND):
            axis.axhline(100 * line.score.mean, color="black", linestyle=LEVELS[line.policy])
        elif _share(line) is not None:
            by_family[family(line.policy)].append(line)
    for name, lines in by_family.items():
        lines.sort(key=lambda line: _share(line) or 0)
        scores = [line.score for line in lines if line.score is not None]
        mean = [100 * s.mean for s in scores]
        below = [100 * (score.mean - score.low) for score in scores]
        above = [100 * (score.high - score.mean) for score in scores]
        colour, mark = marks[name]
        axis.errorbar(
            [100 * (_share(line) or 0) for line in lines],
            mean,
            yerr=[below, above],
            color=colour,
            marker=mark,
            markersize=5,
            capsize=3,
            linewidth=1.2,
        )
    axis.set_title(title(block), fontsize=9, loc="left")
    whole = (
        "a full cache in bfloat16" if any(line.bf16 for line in block.lines) else "the full cache"
    )
    reads = any(line.reads for line in block.lines)
    what = "bytes read per decode step" if reads else "bytes held"
    axis.set_xlabel(f"{what}, % of {whole}", fontsize=8)
    axis.set_ylabel("right %" if block.metric == "exact" else "tokens right %", fontsize=8)
    most = max((_share(line) or 0 for line in block.lines), default=0)
    axis.set_xlim(0, 105 * max(1, most))  # of a float32 cache more than all
    axis.set_ylim(-4, 104)
    axis.spines[["top", "right"]].set_visible(False)


def _share(line: Line) -> float | None:
    """Bytes, of a full cache in bfloat16, or of the full one in files that do not know it.

    Those read per decode step, where the line says them.
    """
    held = line.kept if line.bf16 is None else line.bf16
    return held if line.read is None or not held else held * line.read / (line.kept or 1.0)


def title(block: Block) -> str:
    """Task, length, and protocol where there is a question."""
    asked = f", question {block.protocol}" if block.asks else ""
    return f"{block.task}, {block.tokens} tokens{asked}"


def needles(cells: Iterable[Cell]) -> Any | None:
    """A figure with a heat map per policy and protocol: needles found by length and depth.

    None without such cells.
    """
    found: dict[tuple[str, str], dict[tuple[float, int], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for cell in cells:
        if cell.depth is not None and cell.error is None and cell.policy != BLIND:
            exact = statistics.fmean(answer["exact"] for answer in cell.scores)
            found[cell.policy, cell.protocol][cell.depth, cell.tokens].append(exact)
    if not found:
        return None
    figure, axes = figure_of(len(found))
    for axis, ((policy, protocol), values) in zip(axes, found.items(), strict=False):
        _heat_map(axis, values)
        axis.set_title(f"{policy}, question {protocol}", fontsize=9, loc="left")
    return figure


def _heat_map(axis: Any, values: dict[tuple[float, int], list[float]]) -> None:
    depths, lengths = sorted({depth for depth, _ in values}), sorted({n for _, n in values})
    grid = [
        [
            100 * statistics.fmean(values.get((depth, tokens)) or [float("nan")])
            for tokens in lengths
        ]
        for depth in depths
    ]
    axis.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto", alpha=0.6)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8)
    axis.set_xticks(range(len(lengths)), [str(tokens) for tokens in lengths], fontsize=8)
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_ylabel("depth", fontsize=8)
