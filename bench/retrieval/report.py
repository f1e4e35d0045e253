"""What a report of rankings of pages says: attention recalled, output error, certificates."""

from __future__ import annotations

from typing import Any

from kvpress.bench.common.figures import add_legend, figure_of
from kvpress.bench.common.report import Report, Sheet, machine, settings_of
from kvpress.bench.retrieval.measure import Row, total
from kvpress.bench.retrieval.pages import OURS

KIND = "retrieval"  # the value of "bench" in a record
HEAD = ("ranking", "may read", "reads", "recalled", "error", "omitted", "at most", "more")
LEGEND = (
    "may read, reads: tokens of a row; recalled: the share of attention on what is read, mean over"
    " layers, queries and query heads; error: Σ|o − o'| / Σ|o|. omitted: the share of attention on"
    " what is not read, mean (largest); at most: what the certificate says of it; more: how often"
    " more was omitted. true mass: pages by the attention that they really have, which no ranking"
    " can know."
)


def report(record: dict[str, Any]) -> Report:
    """A sheet of all layers together, and one of each layer with the ranking of the engine."""
    rows = rows_of(record)
    facts = [*settings_of(record["settings"]), *machine(record["environment"])]
    return Report("Rankings of pages", facts, [LEGEND], sheets(rows), lambda: [figure(rows)])


def sheets(rows: list[Row]) -> list[Sheet]:
    """All layers, then single ones."""
    every = tuple(cells_of(row) for row in totals(rows))
    single = tuple((str(row.layer), *cells_of(row)[1:]) for row in rows if row.ranking == OURS)
    tokens, layers = rows[0].tokens, len({row.layer for row in rows})
    return [
        Sheet(f"Rankings of pages, {tokens:,} tokens, {layers} layers", HEAD, every),
        Sheet(f"Single layers, by {OURS}", ("layer", *HEAD[1:]), single),
    ]


def to_record(
    rows: list[Row], environment: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Plain values, ready for JSON."""
    made = [row._asdict() for row in rows]
    return {"bench": KIND, "environment": environment, "settings": settings, "rows": made}


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The measurements in a record."""
    return [Row(**row) for row in record["rows"]]


def totals(rows: list[Row]) -> list[Row]:
    """Every ranking and number of tokens over all layers, in the order of the rows."""
    places = dict.fromkeys((row.ranking, row.read) for row in rows)
    return [total([row for row in rows if (row.ranking, row.read) == place]) for place in places]


def cells_of(row: Row) -> tuple[str, ...]:
    """The entries of a line, as in HEAD."""
    return (
        row.ranking,
        f"{row.read:,}",
        f"{row.tokens_read:,.0f}",
        f"{row.recalled:.2%}",
        f"{row.error:.2%}",
        f"{row.omitted:.2%} ({row.omitted_max:.0%})",
        f"{row.missed:.1%} ({row.missed_max:.0%})",
        f"{row.exceeded} of {row.compared:,}",
    )


def figure(rows: list[Row]) -> Any:
    """Attention recalled and output error, a line per ranking. Raises PlotError."""
    made, axes = figure_of(2)
    found = totals(rows)
    for ranking in dict.fromkeys(row.ranking for row in found):
        own = [row for row in found if row.ranking == ranking]
        read = [row.tokens_read for row in own]
        axes[0].plot(read, [100 * row.recalled for row in own], "o-", label=ranking)
        axes[1].plot(read, [100 * row.error for row in own], "o-")
    for axis, title in zip(axes, ("attention recalled, %", "output error, %"), strict=False):
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("tokens read", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    add_legend(made, *axes[0].get_legend_handles_labels())
    return made
