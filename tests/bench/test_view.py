"""`kvpress view`: what was kept, as a page that needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import types
from html.parser import HTMLParser
from pathlib import Path

import helpers
import pytest
import torch
from kvpress.bench import models
from kvpress.bench.view.kept import Kept, look
from kvpress.bench.view.page import page
from kvpress.bench.view.pieces import pieces
from transformers import BatchEncoding
from typer.testing import CliRunner

import kvpress
from kvpress.cli import app

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for found in map(shutil.which, NAMES) if found), None)
TEXT = "if a < b && c: '</script><b>&amp; naïve 🙂\n\ttab' " * 6


@pytest.fixture(scope="module")
def kept(tiny_model: Path) -> Kept:
    model, tokenizer = models.load(str(tiny_model), device="cpu")
    return look(model, tokenizer, TEXT, "h2o:budget=0.3", name="tiny", max_new_tokens=6)


def test_the_data_is_what_the_cache_says(kept: Kept, tiny_model: Path) -> None:
    model, tokenizer = models.load(str(tiny_model), device="cpu")
    inputs = tokenizer([TEXT], return_tensors="pt", return_token_type_ids=False)
    with kvpress.attach(model, "h2o:budget=0.3") as engine, torch.inference_mode():
        engine.generate(**inputs, max_new_tokens=6, do_sample=False)
        for layer, rows in enumerate(kept.positions):
            for head, positions in enumerate(rows):
                assert positions == engine.cache.kept_positions(layer=layer, head=head)
    assert [[len(row) for row in rows] for rows in kept.positions] == kept.slots_kept
    assert kept.tokens_seen == len(kept.tokens) - 1 == kept.prompt_tokens + 5
    assert max(map(max, map(max, kept.positions))) == kept.tokens_seen - 1


def test_full_keeps_every_position_in_every_row(tiny_model: Path) -> None:
    model, tokenizer = models.load(str(tiny_model), device="cpu")
    made = look(model, tokenizer, "abc" * 9, "full", name="tiny", max_new_tokens=4)
    assert all(row == list(range(made.tokens_seen)) for rows in made.positions for row in rows)


def test_sliding_layers_show_their_window() -> None:
    model = helpers.tiny("gemma3")

    class Bytes:
        all_special_ids: tuple[int, ...] = ()
        added_tokens_decoder = types.MappingProxyType({})

        def __call__(self, texts: list[str], **_: object) -> BatchEncoding:
            return BatchEncoding({"input_ids": helpers.prompt(1, 60)})

        def decode(self, ids: list[int], **_: object) -> str:
            return "x" * len(ids)

    made = look(model, Bytes(), "x", "full", name="tiny", max_new_tokens=2)
    kinds = [layer.kind for layer in made.report.layers]
    for kind, rows in zip(kinds, made.positions, strict=True):
        assert all(len(row) < 61 for row in rows) == (kind == "sliding")


def test_pieces_join_to_the_text_and_leave_no_half_character(tiny_model: Path) -> None:
    _, tokenizer = models.load(str(tiny_model), device="cpu")
    ids = tokenizer(TEXT)["input_ids"]
    made = pieces(tokenizer, ids)
    assert len(made) == len(ids) and "".join(made) == TEXT and "\ufffd" not in "".join(made)
    smile = made.index("🙂")
    assert made[smile - 3 : smile] == ["", "", ""]


class Spans(HTMLParser):
    """The text of every token of a page, and the elements that were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.spans: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append(tag)
        given = dict(attrs)
        if tag == "div":
            self.inside = given.get("id") or ""
        if tag == "span" and self.inside in ("prompt", "answer"):
            self.spans.append("")

    def handle_data(self, data: str) -> None:
        if self.spans and self.inside in ("prompt", "answer"):
            self.spans[-1] += data


def test_the_text_is_escaped_and_the_page_needs_nothing_else(kept: Kept) -> None:
    made = page(kept)
    parsed = Spans()
    parsed.feed(made)
    assert parsed.opened.count("script") == 2 and TEXT not in made
    assert len(parsed.spans) == len(kept.tokens)
    assert "".join(parsed.spans[: kept.prompt_tokens]).startswith("if a < b && c: '</script><b>")
    assert not re.search(r"(src|href)=[\"'](?!#)|https?://|@import|url\(", made)
    assert len(made) < 60_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_colours_the_tokens_of_one_row(kept: Kept, tmp_path: Path) -> None:
    path = tmp_path / "view.html"
    path.write_text(page(kept), encoding="utf-8")

    def states(place: str) -> list[int]:
        """How many rows keep each token, as the script says in the document."""
        options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        options += " --disable-background-networking --disable-component-update --disable-sync"
        options += f" --user-data-dir={tmp_path / 'profile'} --virtual-time-budget=2000 --dump-dom"
        command = [str(CHROMIUM), *options.split(), f"{path.as_uri()}#{place}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "The script of this page failed in line" not in re.sub(
            r"<script.*?</script>", "", done.stdout, flags=re.DOTALL
        )
        text = done.stdout[done.stdout.index('id="prompt"') :]
        return [int(n) for n in re.findall(r'<span[^>]*data-n="(\d+)"', text)]

    for layer, head in ((0, 1), (2, 0)):
        row = set(kept.positions[layer][head])
        expected = [int(position in row) for position in range(kept.tokens_seen)]
        assert states(f"layer={layer}&head={head}") == expected
    rows = [row for rows in kept.positions for row in rows]
    assert states("all") == [sum(p in row for row in rows) for p in range(kept.tokens_seen)]


def test_the_command_writes_the_page_or_prints_the_data(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "view.html"
    options = ["view", "--model", str(tiny_model), "--prompt", "some text", "--device", "cpu"]
    options += ["--policy", "streaming_llm:budget=4,sink=1", "--max-new-tokens", "3"]
    done = CliRunner().invoke(app, [*options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_text().startswith("<!doctype html>")
    printed = CliRunner().invoke(app, [*options, "--json"])
    data = json.loads(printed.stdout)
    assert "".join(data["tokens"][: data["prompt_tokens"]]) == "some text"
    assert all(row == [0, 8, 9, 10] for rows in data["positions"] for row in rows)


def test_what_cannot_be_shown_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for options in (
        ["--out", "/no/such/folder/x.html"],
        ["--out", "x.png"],
        ["--policy", "nothing"],
        ["--prompt", "a", "--prompt-file", "b"],
    ):
        assert CliRunner().invoke(app, ["view", *options]).exit_code != 0
