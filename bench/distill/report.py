"""What a report of retrieval heads says: attention recalled by what they would read."""

from __future__ import annotations

from typing import Any

from kvpress.bench.common.figures import add_legend, figure_of
from kvpress.bench.common.report import Report, Sheet, machine, settings_of
from kvpress.bench.distill.recall import OWN, SHARED, Found, Row

KIND = "heads"  # the value of "bench" in a record
LEGEND = (
    "The share of the attention to what is chosen from (all but first and last tokens, which are"
    " always read) that is on the chosen tokens: mean over layers, heads by their attention,"
    " queries and held-out contexts [95% interval]. true mass: tokens by the attention that they"
    " really have, for all layers together as heads choose, or for each layer; no head can know."
)


def report(record: dict[str, Any]) -> Report:
    """A sheet for each kind of text and unit, and layers."""
    facts = [*settings_of(record["settings"]), *machine(record["environment"])]
    rows = rows_of(record)
    return Report("Retrieval heads", facts, [LEGEND], sheets(rows), lambda: [figure(rows)])


def sheets(rows: list[Row]) -> list[Sheet]:
    """A line per ranking; then layers with the least number of tokens."""
    made = []
    for kind, unit in dict.fromkeys((row.kind, row.unit) for row in rows):
        own = [row for row in rows if (row.kind, row.unit) == (kind, unit)]
        title = f"Attention recalled: {kind}, by {unit}"
        made.append(Sheet(title, head_of(own), tuple(lines_of(own))))
    return [*made, *_layers(rows)]


def head_of(rows: list[Row]) -> tuple[str, ...]:
    """The names of columns: numbers of tokens."""
    return ("ranking", *(f"{read:,} tokens" for read in dict.fromkeys(row.read for row in rows)))


def lines_of(rows: list[Row], layer: int = -1) -> list[tuple[str, ...]]:
    """A line per ranking of one kind and unit; of a layer, or of all."""
    names = dict.fromkeys(row.ranking for row in rows)
    return [(name, *(cell(row, layer) for row in rows if row.ranking == name)) for name in names]


def cell(row: Row, layer: int = -1) -> str:
    """A mean and its interval, in percent."""
    mean, low, high = (100 * ends[layer] for ends in (row.recalled, row.low, row.high))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _layers(rows: list[Row]) -> list[Sheet]:
    """Every layer beside every ranking, with the least number of tokens, one by one."""
    made = []
    least = min(row.read for row in rows)
    for kind in dict.fromkeys(row.kind for row in rows):
        own = [r for r in rows if (r.kind, r.unit, r.read) == (kind, rows[0].unit, least)]
        lines = tuple(
            (str(layer), *(cell(row, layer) for row in own))
            for layer in range(len(own[0].recalled) - 1)
        )
        head = ("layer", *(row.ranking for row in own))
        made.append(Sheet(f"Single layers: {kind}, {least:,} tokens", head, lines))
    return made


def above(gains: list[Row]) -> tuple[int, int, int]:
    """In how many layers the first head surely finds more, in how many less, and of how many."""
    low = [x for row in gains for x in row.low[:-1]]
    high = [x for row in gains for x in row.high[:-1]]
    return sum(x > 0 for x in low), sum(x < 0 for x in high), len(low)


def to_record(
    found: Found, environment: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    made = {name: [row._asdict() for row in rows] for name, rows in found._asdict().items()}
    return {"bench": KIND, "environment": environment, "settings": settings, **made}


def rows_of(record: dict[str, Any], name: str = "rows") -> list[Row]:
    """The measurements in a record; `gains`: of the first head over others."""
    return [Row(**row) for row in record[name]]


def figure(rows: list[Row]) -> Any:
    """Attention recalled by layer, a panel for each kind of text. Raises PlotError."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    made, axes = figure_of(len(kinds))
    least = min(row.read for row in rows)
    for axis, kind in zip(axes, kinds, strict=False):
        for row in rows:
            if (row.kind, row.unit, row.read) != (kind, rows[0].unit, least):
                continue
            style = ":" if row.ranking in (SHARED, OWN) else "-"
            axis.plot([100 * x for x in row.recalled[:-1]], style, label=row.ranking)
        axis.set_title(f"{kind}: recalled, %, {least:,} tokens", fontsize=9, loc="left")
        axis.set_xlabel("layer", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    add_legend(made, *axes[0].get_legend_handles_labels())
    return made
