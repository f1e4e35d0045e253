"""`kvpress view`: what was kept, as a page that needs nothing else."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from kvpress.bench.common import models
from kvpress.bench.view import heads
from kvpress.bench.view.kept import Kept, look
from kvpress.bench.view.maps import MapError, computed_of
from kvpress.bench.view.page import page
from kvpress.bench.view.pieces import pieces
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import kvpress
from kvpress.cli import app
from kvpress.errors import KVPressError
from kvpress.formulas.block_map import Blocks
from kvpress.report.tables import size

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for found in map(shutil.which, NAMES) if found), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    " --disable-background-networking --disable-component-update --virtual-time-budget=5000"
)
TEXT = "if a < b && c: '</script><b>&amp; naïve 🙂\r\n\ttab\x00' " * 4
POLICY = "random:budget=0.3"  # rows differ from each other
ELEMENTS = (
    "html|head|meta|title|style|body|h1|h2|p|b|code|dl|div|dt|dd|noscript|label|select|span|i|u"
    "|canvas|ol|li|a|s|small|script|table|tr|th|td|option"
)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> tuple[Any, Any]:
    """The tiny model, whose tokens are bytes, and its tokenizer."""
    return models.load(str(tiny_model), device="cpu")


@pytest.fixture(scope="module")
def kept(tiny: tuple[Any, Any]) -> Kept:
    return look(*tiny, TEXT, POLICY, name="tiny", max_new_tokens=6)


@pytest.fixture(scope="module", params=["gemma3", "mistral-sliding"])
def windowed(request: pytest.FixtureRequest, tiny: tuple[Any, Any]) -> Kept:
    """What a model keeps of which some or all layers have a sliding window."""
    model = helpers.tiny(request.param, vocab_size=256)
    return look(model, tiny[1], "x" * 60, "random:budget=0.5", name="x", max_new_tokens=2)


def rows_of(kept: Kept, kind: str | None = None) -> list[list[int]]:
    """The positions of every row, or of those in layers of one kind."""
    layers = zip(kept.report.layers, kept.positions, strict=True)
    return [row for layer, rows in layers if kind in (None, layer.kind) for row in rows]


def counts(kept: Kept, rows: Sequence[Sequence[int]]) -> list[str | None]:
    """How many of the rows hold each token; None of the last one, which was never fed."""
    return [str(sum(p in row for row in rows)) for p in range(kept.tokens_seen)] + [None]


# The data


def test_the_data_is_what_the_cache_says(kept: Kept, tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    inputs = tokenizer([TEXT], return_tensors="pt", return_token_type_ids=False)
    with kvpress.attach(model, POLICY) as engine, torch.inference_mode():
        out = engine.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert kept.positions == helpers.positions(engine.cache)
        assert kept.slots_kept == [rows[0] for rows in engine.report().slots_kept]
    assert [[len(row) for row in rows] for rows in kept.positions] == kept.slots_kept
    assert kept.tokens_seen == len(kept.tokens) - 1 == kept.prompt_tokens + 5 == len(out[0]) - 1
    assert max(map(max, rows_of(kept))) == kept.tokens_seen - 1
    assert len({tuple(row) for row in rows_of(kept)}) == len(rows_of(kept))  # none is another's


def test_full_keeps_every_position_in_every_row(tiny: tuple[Any, Any]) -> None:
    made = look(*tiny, "abc" * 9, "full", name="tiny", max_new_tokens=4)
    assert rows_of(made) == [list(range(30))] * 6
    assert made.report.fraction > 0.99


def test_layers_with_a_window_keep_their_last_tokens_whatever_the_policy(windowed: Kept) -> None:
    window = rows_of(windowed, "sliding")
    assert window == [list(range(61 - len(window[0]), 61))] * len(window)
    assert all(len(row) == 30 for row in rows_of(windowed, "full"))


def test_a_prompt_that_does_not_fit_or_is_empty_is_refused(tiny: tuple[Any, Any]) -> None:
    for text, message in (("x" * 1020, "exceed the model's 1024 positions"), ("", "is empty")):
        with pytest.raises(KVPressError, match=message):
            look(*tiny, text, "full", name="tiny", max_new_tokens=9)


# Tokens as text


def test_pieces_join_to_the_text_and_leave_no_half_character(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    ids = tokenizer(TEXT)["input_ids"]
    made = pieces(tokenizer, ids)
    assert len(made) == len(ids) and "".join(made) == TEXT
    smile = made.index("🙂")
    assert made[smile - 4 : smile + 2] == [" ", "", "", "", "🙂", "\r"]


def test_bytes_that_are_no_text_do_not_reach_the_tokens_behind_them(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    ids = tokenizer("é")["input_ids"][:1] * 8 + tokenizer("ok")["input_ids"]
    assert pieces(tokenizer, ids)[-2:] == ["o", "k"]
    text = "a����b"
    made = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert (len(made), made[0], made[-1]) == (14, "a", "b") and "".join(made) == text


def test_a_space_that_a_tokenizer_drops_from_a_first_token_stays_with_others() -> None:
    words = {"▁one": 0, "▁two": 1, "!": 2}
    plain = Tokenizer(WordLevel(words, unk_token="!"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    assert pieces(tokenizer, [0, 1, 1, 0]) == ["one", " two", " two", " one"]


# The page


class Parsed(HTMLParser):
    """The elements of a page, and the text and attributes of every token."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.texts: dict[str, str] = {}  # of elements with an id, and of others by their name
        self.tokens: dict[str, list[dict[str, Any]]] = {"prompt": [], "answer": []}
        self.bars: list[str] = []
        self._inside = self._name = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        given = dict(attrs)
        self._name = given.get("id") or tag
        if tag in ("div", "h2"):
            self._inside = self._name
        if tag == "span" and self._inside in self.tokens:
            self.tokens[self._inside].append({"text": "", **given})
        if tag == "s":
            self.bars.append(str(given["style"]))

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self._inside = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._name] = self.texts.get(self._name, "") + data
        if self.tokens.get(self._inside):
            self.tokens[self._inside][-1]["text"] += data

    @property
    def all(self) -> list[dict[str, Any]]:
        """The tokens of the prompt and of the answer."""
        return self.tokens["prompt"] + self.tokens["answer"]


def test_the_page_shows_every_token_and_nothing_else_becomes_an_element(kept: Kept) -> None:
    report = replace(kept.report, policy="<x>&", notes=["<y>&"])
    text = page(replace(kept, model="<z>&", report=report, special=[3]))
    parsed = Parsed(text)
    assert all(re.fullmatch(ELEMENTS, name) for name in parsed.opened)
    assert parsed.opened.count("script") == 2
    assert text.endswith("</body></html>")
    shown = [token["text"] for token in parsed.all]
    # Python's parser leaves control characters out that a browser shows.
    known = [re.sub(r"[\x01-\x08\x0b\x0e-\x1f\x7f]", "", token) for token in kept.tokens]
    assert shown == [token.replace("\x00", "\ufffd") for token in known]
    assert len(parsed.tokens["prompt"]) == kept.prompt_tokens
    classes = [(token.get("class") or "").split() for token in parsed.all]
    assert [names == ["mark"] for names in classes].index(True) == 3
    assert ["part" in names for names in classes] == [not token for token in kept.tokens]
    assert [i for i, names in enumerate(classes) if "unseen" in names] == [kept.tokens_seen]
    assert parsed.texts["code"].startswith("<x>& kept") and "<y>&" in parsed.texts["p"]


def test_the_page_states_the_report(kept: Kept, windowed: Kept) -> None:
    parsed, slots = Parsed(page(kept)), sum(map(sum, kept.slots_kept))
    for number in (
        kept.tokens_seen,
        slots,
        size(kept.report.bytes_held),
        size(kept.report.bytes_full),
        f"{kept.report.fraction:.1%}",
    ):
        assert str(number) in parsed.texts["dd"]
    share = sum(kept.slots_kept[1]) / 2 / kept.tokens_seen
    assert parsed.bars[1] == f"width:{share:.2%}" and len(parsed.bars) == 3
    windows = sum(layer.kind == "sliding" for layer in windowed.report.layers)
    assert Parsed(page(windowed)).texts["small"] == "window" * windows


def test_budgets_per_head_are_slots_over_tokens_seen(kept: Kept) -> None:
    """A matrix of layers and KV heads in the page and in the terminal."""
    slots = [[3, 30], [3, 30], [51, 6]]
    layers = [
        replace(layer, slots_kept=[rows])
        for layer, rows in zip(kept.report.layers, slots, strict=True)
    ]
    report = replace(kept.report, layers=layers, tokens_seen=[60])
    uneven = replace(kept, report=report, positions=[[[0], [0]]] * 3)
    assert heads.shares(uneven) == [[0.05, 0.5], [0.05, 0.5], [0.85, 0.1]]
    made = heads.sheet(uneven)
    assert made.head == ("layers", "head 0", "head 1")
    assert made.lines == (("0–1", "5.0%", "50.0%"), ("2", "85.0%", "10.0%"))
    said = "Most: layer 2, head 0 keeps 85.0%; least: layer 0, head 0 keeps 5.0%."
    assert made.notes == (said,)
    text = page(uneven)
    (matrix,) = re.findall(r'<table id="heads">.*?</table>', text, re.S)
    cells = re.findall(r'--share:([\d.]+)%"><a href="#layer=(\d)&amp;head=(\d)">', matrix)
    assert cells == [
        (f"{100 * n / 60:.1f}", str(layer), str(head))
        for layer, rows in enumerate(slots)
        for head, n in enumerate(rows)
    ]
    assert said in text and heads.sheet(replace(uneven, report=kept.report)).notes == ()


def test_the_rows_in_the_page_are_bits_of_the_positions_kept(kept: Kept) -> None:
    data = json.loads(Parsed(page(kept)).texts["data"])
    assert (data["seen"], data["prompt"]) == (kept.tokens_seen, kept.prompt_tokens)
    for layer, rows in zip(data["layers"], kept.positions, strict=True):
        for bits, positions in zip(layer["rows"], rows, strict=True):
            number = int.from_bytes(base64.b64decode(bits), "little")
            assert [p for p in range(number.bit_length()) if number >> p & 1] == positions


def test_the_page_names_no_other_file(kept: Kept) -> None:
    assert not re.search(r"(src|href)=[\"'](?!#)|https?:|@import|url\(", page(kept))


def test_a_page_of_many_tokens_and_rows_is_small(kept: Kept) -> None:
    report = replace(kept.report, tokens_seen=[3999], layers=list(kept.report.layers) * 10)
    rows = [list(range(0, 3999, 2))] * 3
    many = replace(kept, tokens=[" word"] * 4000, positions=[rows] * 30, report=report)
    assert len(page(many)) < 250_000


# The page in a browser

WATCH = """
(async () => {
  const changed = () => new Promise((done) => addEventListener("hashchange", done, { once: true }));
  const counts = () => spans.map((span) => span.dataset.n ?? null);
  const at = (x, y) => ({ bubbles: true, clientX: x, clientY: y });
  const pick = async (id, value) => {
    byId(id).value = value;
    byId(id).dispatchEvent(new Event("change"));
    await changed();
    return [location.hash, counts(), byId("summary").textContent];
  };
  const found = { first: counts(), texts: spans.map((span) => span.textContent) };
  found.layer = await pick("layer", "2");
  found.head = await pick("head", "1");
  found.all = await pick("layer", "");
  found.colours = spans.map((span) => palette.findIndex((c) => c.paper === span.style.background.replaceAll(" ", "")));
  const { width, height, bins } = mapSize(), box = canvas.getBoundingClientRect();
  const x = (bin) => LEFT + ((bin + 0.5) * width) / bins, y = (layer) => TOP + (layer + 0.4) * height;
  const pen = canvas.getContext("2d");
  found.map = rows.map((_, layer) => Array.from({ length: bins }, (_, bin) => {
    const pixel = pen.getImageData(x(bin), y(layer), 1, 1).data;
    return palette.findIndex((c) => c.paper === `rgb(${[...pixel.slice(0, 3)]})`);
  }));
  canvas.dispatchEvent(new PointerEvent("pointermove", at(box.left + x(5), box.top + y(1))));
  found.cell = [byId("tip").hidden, byId("tip").textContent];
  canvas.dispatchEvent(new MouseEvent("click", at(box.left + x(5), box.top + y(1))));
  await changed();
  found.clicked = location.hash;
  spans[7].dispatchEvent(new PointerEvent("pointermove", at(9, 9)));
  found.token = byId("tip").textContent;
  document.body.append(Object.assign(document.createElement("pre"), { id: "watched", textContent: JSON.stringify(found) }));
})();
"""  # noqa: E501


def browse(kept: Kept, folder: Path, place: str, width: int = 1280) -> dict[str, Any]:
    """What a script that goes on after the one of the page sees in a browser."""
    path = folder / "view.html"
    # Not before: a line end in the script of the page would hide what the page itself does wrong.
    path.write_text(page(kept) + f"<script>{WATCH}</script>", encoding="utf-8", newline="")
    command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", "--dump-dom", f"{path.as_uri()}#{place}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    texts = Parsed(done.stdout).texts
    assert not texts["error"].strip(), texts["error"]
    watched: dict[str, Any] = json.loads(texts["watched"])
    return watched


def level(kept: int, of: int) -> int:
    """The colour of a share: none for nothing, else its per cent."""
    return int(kept / of * 100 + 0.5) if kept else -1


in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@in_a_browser
def test_the_text_is_coloured_by_the_rows_that_are_chosen(kept: Kept, tmp_path: Path) -> None:
    seen = browse(kept, tmp_path, "layer=1&head=0")
    every = counts(kept, rows_of(kept))
    assert seen["first"] == counts(kept, [kept.positions[1][0]])
    assert seen["layer"][:2] == ["#layer=2", counts(kept, kept.positions[2])]
    assert seen["head"][:2] == ["#layer=2&head=1", counts(kept, [kept.positions[2][1]])]
    assert seen["all"][:2] == ["#all", every]
    slots, lost = kept.slots_kept[2][1], every.count("0")
    assert f"Layer 2, head 1: {slots} of {kept.tokens_seen} tokens are kept" in seen["head"][2]
    assert f"{kept.tokens_seen - lost} of {kept.tokens_seen} tokens" in seen["all"][2]
    assert seen["all"][2].endswith(f"{lost} in none.") and lost
    assert seen["colours"] == [level(int(n or 0), 6) for n in every]
    assert seen["texts"] == [token.replace("\x00", "\ufffd") for token in kept.tokens]


@in_a_browser
def test_the_map_and_the_pointer_tell_what_is_kept_where(kept: Kept, tmp_path: Path) -> None:
    seen = browse(kept, tmp_path, "all")
    for layer, rows in enumerate(kept.positions):
        expected = [level(int(n), 2) for n in counts(kept, rows)[:-1] if n is not None]
        assert seen["map"][layer] == expected
    token = json.dumps(kept.tokens[5])
    cell = f"Position 5: {token}\nLayer 1: kept by {_heads(kept, 1, 5)} of 2"
    assert seen["cell"] == [False, cell] and seen["clicked"] == "#layer=1"
    every = sum(7 in row for row in rows_of(kept))
    assert seen["token"].splitlines() == [
        f"Position 7: {json.dumps(kept.tokens[7])}",
        f"Layer 1: kept by {_heads(kept, 1, 7)} of 2",
        f"Kept in {every} of 6 rows",
    ]


def _heads(kept: Kept, layer: int, position: int) -> str:
    keepers = [str(h) for h, row in enumerate(kept.positions[layer]) if position in row]
    return {0: "no head", 2: "every head"}.get(len(keepers), f"head {', '.join(keepers)}")


@in_a_browser
def test_a_map_narrower_than_the_tokens_shows_shares_of_several(kept: Kept, tmp_path: Path) -> None:
    fed = 6 * len(kept.tokens) - 1
    wide = replace(kept, tokens=kept.tokens * 6, report=replace(kept.report, tokens_seen=[fed]))
    seen = browse(wide, tmp_path, "all", width=700)
    bins = len(seen["map"][0])
    edges = [bin * fed // bins for bin in range(bins + 1)]
    assert 300 < bins < 700 < fed
    for layer, rows in enumerate(kept.positions):
        expected = [
            level(sum(a <= p < b for row in rows for p in row), 2 * (b - a))
            for a, b in pairwise(edges)
        ]
        line = wide.prompt_tokens * bins // fed  # where the answer begins, drawn over the map
        for painted in (seen["map"][layer], expected):
            del painted[line : line + 2]
        assert seen["map"][layer] == expected
    assert seen["cell"][1].startswith(f"Positions {edges[5]} to {edges[6] - 1}: ")


@in_a_browser
def test_rows_that_only_keep_a_window_count_where_there_are_no_others(
    windowed: Kept, tmp_path: Path
) -> None:
    seen = browse(windowed, tmp_path, "layer=0&head=9")
    counted = rows_of(windowed, "full") or rows_of(windowed)
    assert seen["all"][1] == counts(windowed, counted)
    assert seen["first"] == counts(windowed, windowed.positions[0])  # there is no head 9
    named = (
        "Layer 1 (sliding window)" if windowed.report.layers[1].kind == "sliding" else "Layer 1:"
    )
    assert seen["cell"][1].splitlines()[1].startswith(named)


# The command


def test_the_command_writes_the_page_or_prints_the_data(tmp_path: Path, tiny_model: Path) -> None:
    out, prompt = tmp_path / "view.html", tmp_path / "prompt.txt"
    prompt.write_text("some text")
    options = ["view", "--model", str(tiny_model), "--prompt-file", str(prompt), "--device", "cpu"]
    options += ["--policy", "streaming_llm:budget=4,sink=1", "--max-new-tokens", "3"]
    done = CliRunner().invoke(app, [*options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "head 1" in done.output and "36.4%" in done.output  # 4 of 11 tokens, all rows alike
    assert len(Parsed(out.read_text(encoding="utf-8")).all) == 12
    out.unlink()
    data = json.loads(CliRunner().invoke(app, [*options, "--out", str(out), "--json"]).stdout)
    assert "".join(data["tokens"][: data["prompt_tokens"]]) == "some text"
    assert data["positions"] == [[[0, 8, 9, 10]] * 2] * 3
    assert data["report"]["slots_kept"] == [[[4, 4]]] * 3
    assert data["policy"].startswith("streaming_llm") and not out.exists()


def test_the_default_prompt_has_the_length_asked_for(tiny_model: Path) -> None:
    options = ["view", "--model", str(tiny_model), "--prompt-tokens", "200", "--json"]
    data = json.loads(CliRunner().invoke(app, options).stdout)
    assert 200 <= data["prompt_tokens"] <= 202
    assert data["tokens_seen"] == data["prompt_tokens"] + 31


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "/no/such/folder/x.html"], "Make the folder first"),
        (["--out", "x.png"], "must end in .html"),
        (["--policy", "snapkw"], "Did you mean 'snapkv'"),
        (["--prompt", "a", "--prompt-file", "b"], "only one of"),
        (["--prompt-file", "/no/such/file"], "cannot be read"),
        (["--max-new-tokens", "0"], "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_a_model_is_loaded(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.Source, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    done = CliRunner().invoke(app, ["view", *options])
    said = re.sub(r"[\s│]+", " ", f"{done.output} {done.exception}")
    assert message in said and isinstance(done.exception, KVPressError | SystemExit)


def test_the_map_of_a_layer(tiny: tuple[Any, Any], tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, _ = tiny
    heads = model.config.num_attention_heads
    ids = helpers.prompt(1, 500)
    policy = "sale:threshold=1.0,least=1"
    computed = computed_of(model, ids, policy, 1)
    assert computed.shape == (heads, 8, 16)
    with kvpress.attach(model, policy) as engine, torch.no_grad():
        model(ids, cache=engine.new_cache())
        wanted = engine.report().layers[1].density
    found = computed.sum((1, 2)) / Blocks(500, 500).causal
    assert found.tolist() == pytest.approx(wanted)
    with pytest.raises(MapError, match="allowed are"):
        computed_of(model, ids, policy, 99)
    with pytest.raises(MapError, match="attended in full"):
        computed_of(model, ids, "sale:threshold=1.0", 1)
    with pytest.raises(KVPressError, match="computes all"):
        computed_of(model, ids, "full", 1)
    path = tmp_path / "map.png"
    words = ["view", "--model", str(tiny_model), "--policy", policy, "--map", str(path)]
    result = CliRunner().invoke(app, [*words, "--layer", "1", "--prompt", TEXT * 4, "--no-chat"])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
