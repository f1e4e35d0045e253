"""What was kept as one HTML page, which needs no other file and no network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvpress.bench.common.models import known_as
from kvpress.bench.common.page import BASE, shell
from kvpress.bench.view import heads
from kvpress.bench.view.kept import Kept

from kvpress.report.tables import size, span

_MARKS = {"\n": "↵", "\t": "⇥"}  # of other control characters Unicode has pictures
_PICTURES = 0x2400
_HERE = Path(__file__).parent
_SCRIPTS = ("page.js", "reads.js", "tip.js")


def page(kept: Kept) -> str:
    """The page: the text with tokens coloured, the map of layers and positions, budgets, bars."""
    title = f"Tokens that {kept.report.policy} kept"
    return shell(title, (BASE, _HERE / "page.css"), _body(kept))


def _body(kept: Kept) -> Iterable[str]:
    yield from _header(kept)
    yield from _controls()
    yield from _texts(kept)
    yield "<h2>Layers and positions</h2>"
    yield (
        '<p class="hint">The colour is the share of the heads of a layer. Click to choose a layer'
        " and to find a token in the text.</p>"
    )
    yield (
        '<div id="map"><canvas role="img" aria-label="Kept tokens: layers by positions">'
        '</canvas><div id="cursor" hidden></div></div>'
    )
    yield from heads.section(kept)
    yield from _bars(kept)
    yield '<div id="tip" hidden></div>'
    yield f'<script type="application/json" id="data">{_data(kept)}</script>'
    scripts = ((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    yield f"<script>{''.join(scripts)}</script>"


def _header(kept: Kept) -> Iterable[str]:
    report, seen = kept.report, kept.tokens_seen
    rows = sum(len(slots) for slots in kept.slots_kept)
    answer = len(kept.tokens) - kept.prompt_tokens
    facts = {
        "tokens seen": (f"{seen:,}", f"{kept.prompt_tokens:,} of the prompt"),
        "slots kept": (f"{_total(kept):,}", f"of {rows * seen:,} in {rows:,} rows"),
        "bytes held": (size(report.bytes_held), f"of {size(report.bytes_full)}"),
        "share of bytes": (f"{report.fraction:.1%}", "of the full cache"),
    }
    yield f"<h1>Tokens that <code>{html.escape(report.policy)}</code> kept</h1>"
    yield (
        f'<p class="hint">Model <b>{html.escape(known_as(kept.model))}</b>, a prompt of'
        f" {kept.prompt_tokens:,} tokens and {answer:,} decoded greedily. A row is one KV head of"
        f" one layer. {html.escape(report.attention)}</p>"
    )
    for note in report.notes:
        yield f'<p class="hint">Note: {html.escape(note)}</p>'
    yield '<dl class="facts">'
    for name, (value, detail) in facts.items():
        yield f"<div><dt>{name}</dt><dd>{value}</dd><dd>{detail}</dd></div>"
    yield "</dl>"


def _controls() -> Iterable[str]:
    yield '<p id="error" role="alert" hidden></p>'
    yield "<noscript>Colours, the map and the choice of rows need JavaScript.</noscript>"
    yield '<div class="controls">'
    yield '<label>Layer <select id="layer"></select></label>'
    yield '<label>Head <select id="head"></select></label>'
    yield (
        '<label id="shown" hidden>Show <select id="show"><option value="kept">what is kept</option>'
        '<option value="read">what the last step read</option></select></label>'
    )
    yield (
        '<div class="legend text"><span id="none" data-n="0"></span>'
        '<span id="unread" data-n="0" data-held hidden>kept, not read</span><b id="least"></b>'
        '<i id="ramp"></i><b id="most"></b></div>'
    )
    yield '<p id="summary" aria-live="polite"></p></div>'


def _texts(kept: Kept) -> Iterable[str]:
    """The prompt and the answer, one span per token and nothing between them."""
    cut = kept.prompt_tokens
    for name, start, end in (("prompt", 0, cut), ("answer", cut, len(kept.tokens))):
        spans = "".join(_token(kept, position) for position in range(start, end))
        yield f"<h2>The {name}</h2>"
        yield f'<div id="{name}" class="text tokens">{spans}</div>'


def _token(kept: Kept, position: int) -> str:
    text = kept.tokens[position]
    kinds = {
        "mark": position in kept.special,
        "part": not text,
        "unseen": position >= kept.tokens_seen,
    }
    names = " ".join(name for name, given in kinds.items() if given)
    shown = "".join(_visible(char) for char in text)
    return f'<span class="{names}">{shown}</span>' if names else f"<span>{shown}</span>"


def _visible(char: str) -> str:
    """The character in HTML; a control character behind a mark that is not copied with it."""
    if char >= " ":
        return html.escape(char)
    mark = _MARKS.get(char, chr(_PICTURES + ord(char)))
    return f'<u data-c="{mark}"></u>&#{ord(char)};'


def _bars(kept: Kept) -> Iterable[str]:
    """A line per layer: slots of each head, and their share of the tokens seen."""
    yield "<h2>Slots kept per head</h2>"
    yield f'<p class="hint">Of {kept.tokens_seen:,} tokens seen.</p><ol id="bars">'
    for layer, slots in zip(kept.report.layers, kept.slots_kept, strict=True):
        share = sum(slots) / len(slots) / kept.tokens_seen
        window = " <small>window</small>" if layer.kind == "sliding" else ""
        yield (
            f'<li><a href="#layer={layer.index}"><span>layer {layer.index}{window}</span>'
            f'<i><s style="width:{share:.2%}"></s></i><b>{span(slots)}</b></a></li>'
        )
    yield "</ol>"


def _data(kept: Kept) -> str:
    """JSON for the script, safe inside a script element: rows are bits, least significant first."""
    layers: list[dict[str, Any]] = [
        {
            "sliding": layer.kind == "sliding",
            "rows": [_bits(positions, kept.tokens_seen) for positions in rows],
        }
        for layer, rows in zip(kept.report.layers, kept.positions, strict=True)
    ]
    for made, read in zip(layers, kept.read or (), strict=False):
        if read is not None:
            made["reads"] = [_bits(positions, kept.tokens_seen) for positions in read]
    data: dict[str, Any] = {
        "seen": kept.tokens_seen,
        "prompt": kept.prompt_tokens,
        "layers": layers,
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _bits(positions: Sequence[int], tokens: int) -> str:
    """One bit per token in base64: a sixth of a byte per token, whatever was kept."""
    held = bytearray(-(-tokens // 8))
    for position in positions:
        held[position // 8] |= 1 << position % 8
    return base64.b64encode(held).decode()


def _total(kept: Kept) -> int:
    return sum(sum(slots) for slots in kept.slots_kept)
