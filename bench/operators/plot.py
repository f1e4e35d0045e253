"""A picture of a record: what share of the probe each candidate reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpress.bench.common.figures import PlotError, require
from kvpress.bench.common.output import OutputError
from kvpress.bench.operators.record import rate
from kvpress.bench.operators.registry import PROBE

WIDTH, DPI = 10, 100  # inches and dots per inch: 1000 pixels
_BAR = 0.27  # inches of height per bar
_COLOURS = ("#1b6ca8", "#e08e2b", "#b7b7b7", "#4f9d69", "#8e5aa8")


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Writes a bar plot of a record, 1000 pixels wide. Raises PlotError and OutputError.

    One panel per operator, one bar per case and candidate; the line at 100 % is the probe.
    """
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(case["group"] for case in record["cases"]))
    if not groups:
        raise PlotError("The record holds no case, so there is nothing to draw. Run some cases.")
    panels = [[case for case in record["cases"] if case["group"] == group] for group in groups]
    heights = [sum(len(_bars(case)) + 0.6 for case in cases) + 2.5 for cases in panels]
    figure = Figure(figsize=(WIDTH, sum(heights) * _BAR + 0.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    names = [name for case in record["cases"] for name in case["candidates"] if name != PROBE]
    colours = _colours(list(dict.fromkeys(names)), groups)
    for axis, group, cases in zip(axes, groups, panels, strict=True):
        _panel(axis, group, cases, colours)
    axes[-1].set_xlabel("share of the probe: rate / rate of a plain read, or of a matrix product")
    figure.suptitle(_title(record["environment"]), fontsize=10)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}. Give another file.") from error


def _title(facts: Mapping[str, Any]) -> str:
    where = facts["cpu"] if facts["device"] == "cpu" else facts["device"]
    commit = f", commit {facts['commit'][:10]}" if facts["commit"] else ""
    return f"{where}, {facts['threads']} threads, torch {facts['versions']['torch']}{commit}"


def _bars(case: Mapping[str, Any]) -> list[str]:
    """The candidates that get a bar; one empty bar for a case that was refused."""
    return [name for name in case["candidates"] if name != PROBE] or ["refused"]


def _colours(names: Sequence[str], groups: Sequence[str]) -> dict[str, str]:
    """A colour per candidate; the operator of a panel always has the first one."""
    others = [name for name in names if name not in groups]
    colours = {name: _COLOURS[1 + i % (len(_COLOURS) - 1)] for i, name in enumerate(others)}
    return {**colours, **dict.fromkeys(groups, _COLOURS[0])}


def _panel(axis: Any, group: str, cases: Sequence[Any], colours: Mapping[str, str]) -> None:
    place, ticks, largest = 0.0, [], 1.0
    for case in cases:
        bars = _bars(case)
        ticks.append(place + (len(bars) - 1) / 2)
        for name in bars:
            entry = case["candidates"].get(name)
            share = entry["share_of_probe"] or 0.0 if entry else 0.0
            largest = max(largest, share)
            # Another operator beside the one that the panel is about is drawn pale.
            alpha = 0.45 if name != group and colours.get(name) == _COLOURS[0] else 1.0
            axis.barh(place, share, height=0.85, color=colours.get(name, "none"), alpha=alpha)
            axis.text(share, place, f" {_label(name, entry)}", va="center", fontsize=8)
            place += 1
        place += 0.6
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yticks(ticks, [case["name"] for case in cases], fontsize=8)
    axis.set_ylim(place - 0.6, -0.9)
    axis.set_xlim(0, largest * 1.35)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_title(group, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _label(name: str, entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "refused: its check is red"
    share = entry["share_of_probe"]
    of_probe = "" if share is None else f"{share:.0%}, "
    return f"{name}: {of_probe}{rate(entry['rate'], entry['unit'])}"
