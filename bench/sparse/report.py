"""What a report of sparse prompt attention says: all layers of each length, and every layer."""

from __future__ import annotations

from typing import Any

from kvpress.bench.common.figures import add_legend, figure_of
from kvpress.bench.common.report import Report, Sheet, machine, settings_of
from kvpress.bench.sparse.measure import Row, Total, total

KIND = "sparse"  # the value of "bench" in a record
HEAD: tuple[str, ...] = (
    "tokens",
    "layers",
    "exact s",
    "sparse s",
    "speed-up",
    "low–high",
    "estimate",
)
HEAD += ("density", "error")
LEGEND = (
    "estimate: its share of the exact time; density: blocks computed, of those that are causal;"
    " error: Σ|o − o'| / Σ|o|."
)


def report(record: dict[str, Any]) -> Report:
    """A sheet of totals and one of layers; time and density over layers."""
    rows = rows_of(record)
    lines = tuple(cells_of(one) for one in totals(rows))
    singles = tuple((str(row.layer), *cells_of(total([row]))) for row in rows)
    sheets = [
        Sheet("All layers", HEAD, lines),
        Sheet("Single layers", ("layer", *(h for h in HEAD if h != "layers")), _without(singles)),
    ]
    facts = [*settings_of(record["settings"]), *machine(record["environment"])]
    return Report("Sparse prompt attention", facts, [LEGEND], sheets, lambda: [figure(rows)])


def to_record(
    rows: list[Row], environment: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    made = [row._asdict() for row in rows]
    return {"bench": KIND, "environment": environment, "settings": settings, "rows": made}


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The measurements in a record."""
    return [Row(**row) for row in record["rows"]]


def totals(rows: list[Row]) -> list[Total]:
    """What the layers of each length come to together."""
    return [total(r for r in rows if r.tokens == n) for n in sorted({row.tokens for row in rows})]


def cells_of(one: Total) -> tuple[str, ...]:
    """The entries of a line, as in HEAD."""
    return (
        f"{one.tokens:,}",
        str(one.layers),
        f"{one.exact:.2f}",
        f"{one.estimate + one.attend:.2f}",
        f"{one.gain:.2f}×",
        f"{one.low:.2f}–{one.high:.2f}",
        f"{one.estimate / one.exact:.1%}",
        f"{one.density:.1%}",
        f"{one.error:.2%}",
    )


def figure(rows: list[Row]) -> Any:
    """Speed-up and density of every layer, a line per length. Raises PlotError."""
    made, axes = figure_of(2)
    for tokens in sorted({row.tokens for row in rows}):
        chosen = [row for row in rows if row.tokens == tokens]
        layers = [row.layer for row in chosen]
        axes[0].plot(
            layers, [total([row]).gain for row in chosen], "o-", label=f"{tokens:,} tokens"
        )
        axes[1].plot(layers, [row.density for row in chosen], "o-")
    for axis, title in zip(axes, ("exact time / sparse time", "density"), strict=False):
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("layer", fontsize=8)
        axis.set_ylim(0)
        axis.spines[["top", "right"]].set_visible(False)
    add_legend(made, *axes[0].get_legend_handles_labels())
    return made


def _without(lines: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """Lines of single layers, less how many they are."""
    return tuple((*line[:2], *line[3:]) for line in lines)
