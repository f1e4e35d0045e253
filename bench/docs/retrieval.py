"""Tables of policies that read some pages only: quality beside bytes read, rankings, steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvpress.bench.common.journal import read
from kvpress.bench.docs.quality import lines
from kvpress.bench.docs.tables import RESULTS, code, percent, table
from kvpress.bench.quality.run import BLIND, FULL
from kvpress.bench.quality.table import Line
from kvpress.bench.retrieval import report as rankings
from kvpress.bench.speed.decode import bytes_read
from kvpress.bench.speed.rows import against, by_cell, times
from kvpress.bench.tiers import report as tiers
from kvpress.bench.tiers.steps import CAPPED, UNTIERED

LONG, OFFLINE = "quality-reads-7400.jsonl", "quality-reads-{}.jsonl"
RANKED, LAYER, TIERS = "retrieval-7400.json", "decode-layer.jsonl", "tiers-leoam.json"
_MISSING = "Not recorded yet."
_MIB = 2**20
_Block = tuple[str, int, str]  # task, tokens, protocol


def _made(file: str, make: Callable[[], str]) -> str:
    """A part of a file, where there is one already."""
    known = any((RESULTS / name).is_file() for name in (file, f"{file}.gz"))
    return make() if known else _MISSING


def _needles() -> str:
    """Needles after long contexts."""
    blocks = [block for block in lines(LONG) if block[1] == 7400]
    return _scores(LONG, blocks, [f"{task}, {protocol}" for task, _, protocol in blocks])


def _offline(tokens: int) -> str:
    """Every task of a length, the question hidden where there is one."""
    file = OFFLINE.format(tokens)
    found = lines(file)
    blocks = [block for block in found if block[1:] == (tokens, "hidden")]
    return _scores(file, blocks, [task for task, *_ in blocks])


def _scores(file: str, blocks: Sequence[_Block], titles: Sequence[str]) -> str:
    """A line per policy: tokens and bytes that a step reads, the certificate, and scores."""
    found = lines(file)
    names = dict.fromkeys(name for block in blocks for name in found[block])
    rows = []
    for name in sorted(names, key=lambda name: (name != FULL, name == BLIND)):
        own = [found[block].get(name) for block in blocks]
        first = next(line for line in own if line is not None)
        scores = ["–" if line is None else _score(line) for line in own]
        rows.append([name if name == BLIND else code(name), *_read(first), *scores])
    return table(["", "held", "read", "tokens read", "missed at most", *titles], rows)


def _read(line: Line) -> tuple[str, ...]:
    """What a step reads after contexts of the first task."""
    return (
        *("–" if x is None else percent(x) for x in (line.kept, line.read)),
        f"{line.reads.tokens:,.0f}" if line.reads else "–",
        line.reads.missed if line.reads else "–",
    )


def _score(line: Line) -> str:
    return "–" if line.score is None else str(line.score)


def _rankings() -> str:
    """Rankings over layers."""
    found = rankings.totals(rankings.rows_of(_record(RANKED)))
    heads = ("", "may read", "reads", "attention recalled", "output error", "omitted", "at most")
    cells = (rankings.cells_of(row) for row in found)
    return table((*heads, "more than that"), cells)


def _layer() -> str:
    """Steps of one layer: medians and quartiles, what they read, and what choosing takes."""
    ((cell, found),) = by_cell(read(RESULTS / LAYER)).items()
    full = found[FULL]
    rows = []
    for name, row in found.items():
        first, third = (1e3 * x for x in row["seconds"]["quartiles"])
        chosen = row["selection"]
        share = chosen["median"] / row["seconds"]["median"] if chosen else None
        rows.append(
            (
                code(name),
                f"{1e3 * row['seconds']['median']:.2f} ({first:.2f}–{third:.2f})",
                f"{row['reads']['tokens_read']:,.0f}" if row["reads"] else f"{cell.tokens:,}",
                f"{bytes_read(row) / _MIB:.0f}",
                times(against(full, row)),
                "–" if share is None else percent(share),
            )
        )
    head = ("", "step, ms", "tokens read", "MiB read", "over `full`", "of it selection")
    return table(head, rows)


def _tiers() -> str:
    """Steps under caps that choose pages, beside those that stream everything."""
    rows = tiers.good(_record(TIERS)["candidates"])
    made = []
    for name, row in rows.items():
        ms, spread, _, waited, disk, _, same = tiers.step_cells(rows.get(UNTIERED), row)
        over, *rest = tiers.choice_cells(rows.get(CAPPED), row)
        made.append((name, f"{ms} ({spread})", over, waited, disk, *rest, same))
    head = ("", "step, ms", "over exact streaming", "waited, ms", "from disk, MiB")
    more = ("loaded, MiB", "hits", "tokens read", "chosen again", "ahead", "in vain")
    return table((*head, *more, "same tokens, same bits"), made)


def _record(file: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return record


PARTS: Mapping[str, Callable[[], str]] = {
    "retrieval-needles": lambda: _made(LONG, _needles),
    "retrieval-2048": lambda: _made(OFFLINE.format(2048), lambda: _offline(2048)),
    "retrieval-rankings": lambda: _made(RANKED, _rankings),
    "retrieval-layer": lambda: _made(LAYER, _layer),
    "retrieval-tiers": lambda: _made(TIERS, _tiers),
}
