"""Budgets per head: which share of the tokens seen each KV head of each layer still holds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from kvpress.bench.common.report import Sheet
from kvpress.bench.view.kept import Kept


def shares(kept: Kept) -> list[list[float]]:
    """Slots kept over tokens seen: `[layer][KV head]`."""
    return [[slots / kept.tokens_seen for slots in rows] for rows in kept.slots_kept]


def sheet(kept: Kept) -> Sheet:
    """The matrix for a terminal: a line per layer, one for neighbours that are alike."""
    heads = max(len(rows) for rows in kept.slots_kept)
    lines = []
    for rows, layers in groupby(kept.report.layers, key=lambda layer: tuple(layer.slots_kept[0])):
        first, *rest = (layer.index for layer in layers)
        name = f"{first}–{rest[-1]}" if rest else str(first)
        texts = [f"{slots / kept.tokens_seen:.1%}" for slots in rows]
        lines.append((name, *texts, *["–"] * (heads - len(texts))))
    title = f"Tokens that each KV head keeps, of {kept.tokens_seen:,} seen"
    head = ("layers", *(f"head {number}" for number in range(heads)))
    return Sheet(title, head, tuple(lines), tuple(_extremes(kept)))


def section(kept: Kept) -> Iterator[str]:
    """The matrix for the page: a cell is filled by its share, and leads to its row."""
    heads = max(len(rows) for rows in kept.slots_kept)
    yield "<h2>Budgets per head</h2>"
    yield f'<p class="hint">Share of the {kept.tokens_seen:,} tokens seen that each KV head keeps.'
    yield " ".join(_extremes(kept)) + "</p>"
    yield '<div class="wide"><table id="heads">'
    yield f"<tr><th>layer</th>{''.join(f'<th>head {number}</th>' for number in range(heads))}</tr>"
    for layer, rows in zip(kept.report.layers, shares(kept), strict=True):
        cells = "".join(_cell(layer.index, head, share) for head, share in enumerate(rows))
        yield f"<tr><th>{layer.index}</th>{cells}</tr>"
    yield "</table></div>"


def _cell(layer: int, head: int, share: float) -> str:
    link = f'<a href="#layer={layer}&amp;head={head}">{share:.0%}</a>'
    return f'<td style="--share:{share:.1%}">{link}</td>'


def _extremes(kept: Kept) -> Iterator[str]:
    """Where most and least stays, unless all rows are alike."""
    places = {
        (layer, head): share
        for layer, rows in enumerate(shares(kept))
        for head, share in enumerate(rows)
    }
    most, least = (pick(places, key=lambda place: places[place]) for pick in (max, min))
    if places[most] > places[least]:
        named = (
            f"layer {layer}, head {head} keeps {places[layer, head]:.1%}"
            for layer, head in (most, least)
        )
        yield f"Most: {next(named)}; least: {next(named)}."
