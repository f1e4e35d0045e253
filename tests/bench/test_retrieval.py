"""Policies whose decode steps read some pages only: what is asked of them, and what is shown."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import helpers
import pytest
import torch
from kvpress.bench.calibrate.watch import Given
from kvpress.bench.common import models
from kvpress.bench.common.text import default_text
from kvpress.bench.docs import quality as docs_quality
from kvpress.bench.docs import retrieval as docs
from kvpress.bench.quality import plots, run, suites, summary, table
from kvpress.bench.quality.reading import How
from kvpress.bench.quality.results import Cell, Results, load
from kvpress.bench.quality.sample import Writer
from kvpress.bench.quality.system import LocalSystem
from kvpress.bench.quality.tasks import TASKS
from kvpress.bench.retrieval import measure
from kvpress.bench.retrieval.pages import OURS, RANKINGS
from kvpress.bench.sparse import tiled
from kvpress.bench.speed import benches, layer
from kvpress.bench.speed.rows import Cell as Place
from kvpress.bench.speed.setting import Setting
from kvpress.bench.tiers import report, steps
from kvpress.bench.view.kept import Kept, look
from kvpress.bench.view.page import page
from kvpress.bench.view.reads import read_positions
from typer.testing import CliRunner

import kvpress
from kvpress import ops
from kvpress.cli import app

QUEST = "quest:read=96,recent=16,dense=1"


@pytest.fixture
def tiny(tiny_model: Path) -> tuple[Any, Writer]:
    """The tiny model, whose tokens are bytes, and what writes contexts for it."""
    model, tokenizer = models.load(str(tiny_model), device="cpu")
    return model, Writer(tokenizer, default_text().content[:9000])


# ---- kvpress eval


@pytest.mark.parametrize("stepwise", [False, True])
def test_questions_are_fed_token_by_token(stepwise: bool, tiny: tuple[Any, Writer]) -> None:
    """A pass of several tokens reads everything, and would answer as the full cache does."""
    model, writer = tiny
    sample = TASKS["needle"].make(writer, random.Random(1), 400, 0)
    quest, full, (question,) = (
        LocalSystem(model, QUEST),
        LocalSystem(model, "full"),
        sample.questions,
    )
    cache = quest.read(sample.context)
    logits = quest.ask(cache, question, stepwise)
    with kvpress.attach(model, QUEST) as engine, torch.inference_mode():
        own = engine.new_cache()
        model(torch.tensor([sample.context]), cache=own)
        fed = [*question.prompt, *question.answer[:-1]]
        steps = [model(torch.tensor([[token]]), cache=own).logits[0, -1] for token in fed]
    torch.testing.assert_close(logits, torch.stack(steps[len(question.prompt) - 1 :]))
    wanted = full.ask(full.read(sample.context), question)
    assert not torch.allclose(logits, wanted, rtol=1e-3, atol=1e-3)
    assert quest.decode(cache, question.prompt, 3) == _greedy(model, sample.context, question, 3)


def _greedy(model: Any, context: Any, question: Any, most: int) -> list[int]:
    made: list[int] = []
    with kvpress.attach(model, QUEST) as engine, torch.inference_mode():
        own = engine.new_cache()
        model(torch.tensor([context]), cache=own)
        for token in question.prompt:
            logits = model(torch.tensor([[token]]), cache=own).logits
        while len(made) < most:
            made.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([made[-1:]]), cache=own).logits
    return made


def test_cells_say_what_steps_read(tiny: tuple[Any, Writer], tmp_path: Path) -> None:
    model, writer = tiny
    path, names = tmp_path / "cells.jsonl", ("full", "snapkv:budget=0.5", QUEST)
    systems = [LocalSystem(model, name) for name in names]
    plans = [suites.Plan(TASKS["needles-2"], 400, 1, p) for p in ("hidden", "visible")]
    results = Results({}, {}, path)
    run.evaluate(systems[0], systems, writer, plans, results, How())
    cells = {(cell.protocol, cell.policy): cell for cell in load(path)}
    assert all(cell.error is None for cell in cells.values())
    assert [name for (_, name), cell in cells.items() if cell.reads] == [QUEST] * 2
    hidden, visible = (cells[p, QUEST].reads for p in ("hidden", "visible"))
    assert hidden is not None and visible is not None
    sample = TASKS["needles-2"].make(writer, random.Random(0), 400, 0)
    answers = sum(len(q.answer) for q in sample.questions)
    asked = sum(len(q.prompt) for q in sample.questions)
    assert hidden["steps"] == asked + answers - 2
    assert 64 <= hidden["tokens_read"] <= 96 + 32 and 0 < hidden["missed_mean"] <= 1
    full = cells["hidden", QUEST].bytes_full
    assert full / 3 < hidden["bytes_read"] < 0.75 * full  # one layer of three reads everything
    blocks = list(table.blocks(load(path)))
    full_line, snapkv, quest, _ = blocks[0].lines
    assert quest.read == pytest.approx(hidden["bytes_read"] / full) and quest.kept > 1
    assert (full_line.read, snapkv.read) == (full_line.kept, snapkv.kept)
    sheet = next(iter(table.sheets(load(path))))
    place = sheet.head.index("tokens read")
    assert [line[place] for line in sheet.lines[:2]] == ["–"] * 2
    assert sheet.lines[2][place] == f"{hidden['tokens_read']:,.0f}"
    assert sheet.lines[0][place - 1] == sheet.lines[0][1]
    pytest.importorskip("matplotlib")
    axis = plots.quality(blocks).axes[0]
    assert axis.get_xlabel().startswith("bytes read per decode step")


def test_results_of_before_say_nothing_of_reads(tmp_path: Path) -> None:
    cell = Cell("copy", 300, 0, "hidden", "full", [_right()], bytes_held=9, bytes_full=9)
    line = {name: value for name, value in vars(cell).items() if name != "reads"}
    path, head = tmp_path / "old.jsonl", {"format": 1, "settings": {}, "environment": {}}
    path.write_text("".join(f"{json.dumps(x)}\n" for x in (head, line)))
    assert list(load(path)) == [cell]
    assert "read" not in next(iter(table.sheets(load(path)))).head


def _right() -> dict[str, float]:
    return {"exact": 1.0, "tokens": 1.0, "nll": 0.1, "kl": 0.0, "agreement": 1.0}


def test_the_summary_shows_bytes_read_where_a_policy_reads_less_than_it_holds() -> None:
    reads = {"steps": 5, "tokens_read": 96.0, "bytes_read": 30, "missed_mean": None}
    cells = [
        Cell(task, 300, 0, "hidden", policy, [_right()], None, 100, 100, bytes_bf16=50)
        for task in ("copy", "facts")
        for policy in ("full", QUEST)
    ]
    head = next(iter(summary.sheets(cells))).head
    assert "read of bf16" not in head
    chosen = {**reads, "missed_max": None}
    cells = [replace(x, reads=chosen) if x.policy == QUEST else x for x in cells]
    sheet = next(iter(summary.sheets(cells)))
    place = sheet.head.index("read of bf16")
    assert [line[place] for line in sheet.lines] == ["200.0%", "60.0%"]
    quest = next(iter(table.blocks(cells))).lines[1]
    assert quest.reads is not None and quest.reads.missed == "–"  # nothing was certified


def test_budgets_of_reading_are_one_line_of_a_plot() -> None:
    assert plots.family("quest:read=256") == "quest"
    assert plots.family("leoam:read=0.2,recent=32") == "leoam:recent=32"
    assert plots.family("snapkv:budget=0.5+quest:read=64") == "snapkv+quest"


def test_a_fork_counts_its_own_steps() -> None:
    model, ids = families.tiny(), helpers.prompt(1, 300)
    with kvpress.attach(model, QUEST) as engine, torch.inference_mode():
        cache = engine.new_cache()
        model(ids, cache=cache)
        fork = cache.fork()
        model(ids[:, :1], cache=fork)
        assert fork.report().layers[1].reads.steps == 2 and cache.report().layers[1].reads is None


# ---- kvpress bench retrieval


def given_of(tokens: int, heads: int = 2, group: int = 3, width: int = 16) -> Given:
    """Random states of a layer, whose keys are alike within topics of 24 tokens."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    topic = drawn(1, heads, tokens // 24 + 1, width).repeat_interleave(24, 2)[:, :, :tokens]
    key = topic + 0.3 * drawn(1, heads, tokens, width)
    return Given(drawn(1, heads * group, tokens, width), key, drawn(1, heads, tokens, width), 0.25)


def test_a_ranking_reads_what_the_engine_would_read() -> None:
    """Against a policy on rows with the same keys: the same tokens, and the same certificate."""
    given, how = given_of(400), measure.How(reads=[128], queries=1, sink=4, recent=16)
    (row,) = [row for row in measure.measure(0, given, how) if row.ranking == OURS]
    shape = tiled.Shape(heads=2, group=3, width=16, dtype="float32")
    own = tiled.layer_of(shape, None, "quest:read=128,recent=16,dense=0,candidates=none")
    query, key, value, scaling = given
    made = tiled.Tiles(query, key, value)
    tiled.fill(own, made, 399, lambda _: None)
    out = tiled.step(own, made.tokens(399, 400))
    figures = own.reads.figures
    assert figures is not None
    assert row.tokens_read == figures.tokens_read
    assert row.missed == pytest.approx(figures.missed_mean, rel=1e-4)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, -1:], key, value, scale=scaling, enable_gqa=True
    )
    error = float((exact - out).abs().sum() / exact.abs().sum())
    assert row.error == pytest.approx(error, rel=1e-4)


def test_the_certificate_is_never_exceeded_and_all_is_recalled_where_all_is_read() -> None:
    rows = list(measure.measure(0, given_of(500), measure.How(reads=[64, 192, 500], queries=20)))
    assert {row.ranking for row in rows} == set(RANKINGS)
    for row in rows:
        assert row.exceeded == 0 and row.compared == 20 * 6
        assert row.omitted <= row.missed and row.tokens_read <= max(row.read, 64 + 64)
        if row.read == 500:
            assert row.recalled == 1.0 and row.error < 1e-6 and row.missed == 0
    at = {row.ranking: row.recalled for row in rows if row.read == 192}
    assert at["true mass"] == max(at.values()) and at[OURS] > at["random"]


def test_layers_together_are_means_and_the_largest() -> None:
    rows = list(measure.measure(0, given_of(300), measure.How(reads=[64], queries=3)))[:1]
    other = rows[0]._replace(layer=1, recalled=0.0, omitted_max=1.0, exceeded=2)
    both = measure.total([rows[0], other])
    assert both.recalled == rows[0].recalled / 2 and both.omitted_max == 1.0
    assert (both.exceeded, both.compared) == (2, 2 * rows[0].compared)


def test_the_command_ranks_pages_of_a_model(tiny_model: Path, tmp_path: Path) -> None:
    out, numbers = tmp_path / "ranked.json", ["--tokens", 400, "--read", 96, "--queries", 4]
    words = ["bench", "retrieval", "--model", tiny_model, "--layers", 2, *numbers, "--out", out]
    shown = invoke(*words)
    record = json.loads(out.read_text())
    assert "mean radius" in shown and len(record["rows"]) == 2 * len(RANKINGS)
    assert {row["layer"] for row in record["rows"]} == {0, 2}
    assert record["settings"]["reads"] == [96] and record["settings"]["page"] == 32
    assert json.loads(invoke(*words, "--json"))["rows"] == record["rows"]
    assert "Single layers" in invoke("report", out)
    pytest.importorskip("matplotlib")
    invoke("plot", out, "--out", tmp_path / "ranked.png")


def invoke(*arguments: Any) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


# ---- kvpress bench decode


def test_decode_steps_say_what_they_read() -> None:
    setting = Setting(model="tiny", rounds=2, warmup=1)
    ids, names = helpers.prompt(1, 400), ["transformers", "full", QUEST]
    cell = Place("decode", 400, 2)
    rows = benches.timed(
        setting, benches.LocalCandidates(), helpers.tiny("llama"), ids, cell, names
    )
    assert [row["error"] for row in rows.values()] == [None] * 3
    reads = rows[QUEST]["reads"]
    assert rows["full"]["reads"] is rows["transformers"]["reads"] is None
    assert reads["steps"] == 3 and 64 < reads["tokens_read"] <= 96
    assert reads["bytes_read"] < 0.7 * rows["full"]["bytes_held"]
    named = {"bench": "decode", "tokens": 400, "batch": 2, "quality": []}
    (sheet,) = benches.sheets_of([{**named, "candidate": n, **row} for n, row in rows.items()])
    place = sheet.head.index("tokens read")
    assert [line[place] for line in sheet.lines] == ["all", "all", f"{reads['tokens_read']:.0f}"]
    del rows[QUEST]  # what older rows look like, and rows without such a policy
    rows["full"].pop("reads")
    (sheet,) = benches.sheets_of([{**named, "candidate": n, **row} for n, row in rows.items()])
    assert "tokens read" not in sheet.head


def test_a_layer_is_timed_alone_and_its_selection_apart(tiny_model: Path) -> None:
    model, tokenizer = models.load(str(tiny_model), device="cpu")
    setting, names = Setting(model="tiny", rounds=2, warmup=1), ["full", "quest:read=128"]
    shape = {"heads": 2, "group": 2, "width": 32, "read": 300}
    before = {name: getattr(ops, name) for name in layer._SELECTION if hasattr(ops, name)}
    given = (setting, model, tokenizer, Place("layer", 600, 1), names, None)
    rows = layer.measure(*given, **shape)
    assert [row["error"] for row in rows.values()] == [None] * 2
    assert {name: getattr(ops, name) for name in before} == before
    full, quest = rows["full"], rows["quest:read=128"]
    assert full["selection"] is full["reads"] is None
    assert quest["selection"]["count"] == 2 and quest["selection"]["low"] > 0
    assert quest["reads"]["steps"] == 6 and quest["reads"]["tokens_read"] <= 128
    whole = 2 * 2 * 32 * 606 * 2
    assert full["bytes_held"] >= whole and quest["reads"]["bytes_read"] < whole / 3
    named = {"bench": "layer", "tokens": 600, "batch": 1, "quality": []}
    (sheet,) = benches.sheets_of([{**named, "candidate": n, **row} for n, row in rows.items()])
    assert sheet.head[-3:] == ("read MiB", "vs full", "selection") and sheet.lines[0][-1] == "–"


@pytest.mark.parametrize(
    "options",
    [["--batch", 2], ["--device", "64MiB"], ["--with-eval"], ["--tokens", 9, "--batch", 3]],
)
def test_one_layer_takes_no_options_of_a_model(options: list[Any]) -> None:
    done = CliRunner().invoke(app, ["bench", "decode", "--case", "one-layer", *map(str, options)])
    assert done.exit_code == 2
    wrong = CliRunner().invoke(app, ["bench", "decode", "--case", "two-layers"])
    assert wrong.exit_code == 2 and "one-layer" in wrong.output


# ---- kvpress bench tiers


def test_a_policy_that_chooses_stands_beside_exact_streaming(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, policy = tmp_path / docs.TIERS, "leoam:read=0.2,recent=32"
    guesses = f"{policy},guess=layer"
    numbers = ["--tokens", 800, "--batch", 2, "--steps", 3, "--warmup", 1, "--memory-steps", 2]
    words = ["--model", tiny_model, *numbers, "--records", 16, "--threads", 1, "--out", out]
    caps = ["--device", "cpu,0.6", "--host", 0.3, "--policy", policy, "--policy", guesses]
    shown = " ".join(invoke("bench", "tiers", *words, *caps).split())
    rows = json.loads(out.read_text())["candidates"]
    cases = ("all on the device", "under the caps")
    ours = [f"{name}, {case}" for name in (policy, guesses) for case in cases]
    exact = ["without tiers", "tiers, all on the device", "under the caps"]
    assert list(rows) == [*exact, *ours]
    for row in rows.values():
        assert row["error"] is None and row["same_tokens"], row
    assert all(rows[name]["same_logits"] for name in (*ours, "under the caps"))
    assert all(rows[name]["reads"] is None for name in exact)
    for name in ours:
        assert 800 * 0.2 < rows[name]["reads"]["tokens_read"] < 800 * 0.6
    less, ahead, more = (rows[name]["per_step"] for name in (ours[1], ours[3], "under the caps"))
    assert less["again"] == ahead["again"] and less["adjacent"] == ahead["adjacent"] > 0
    assert less["missing"] and not less["ahead"] and not less["vain"]
    assert 0 < ahead["ahead"] <= ahead["missing"]
    cells = [report.choice_cells(None, rows[name])[-3:] for name in ("under the caps", *ours)]
    assert cells[0] == ("–", "–", "–") and cells[2][1:] == ("0 %", "0")
    assert cells[4][1] == f"{100 * ahead['ahead'] / ahead['missing']:.0f} %"
    assert less["host to device"] < more["host to device"] and more["disk to host"] > 0
    hits = sum(less[f"hits {name}"] for name in ("device", "host", "disk"))
    assert 0 < hits < sum(more[f"hits {name}"] for name in ("device", "host", "disk"))
    assert "tokens read" in shown and "## Decode steps" in invoke("report", out)
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert docs.PARTS["retrieval-tiers"]().count("\n") == 1 + len(rows)


def test_what_is_exact_of_a_policy_is_the_rest_of_it() -> None:
    assert steps.exact_part("full") == "full" and steps.exact_part("leoam:read=0.2") == "full"
    assert steps.exact_part("snapkv:budget=0.5") == "snapkv:budget=0.5"
    assert steps.exact_part("snapkv:budget=0.5+quest").startswith("snapkv:budget=0.5")
    assert "quest" not in steps.exact_part("snapkv:budget=0.5+quest")


# ---- kvpress view


@pytest.fixture(scope="module")
def viewed(tiny_model: Path) -> Kept:
    model, tokenizer = models.load(str(tiny_model), device="cpu")
    policy = "snapkv:budget=0.9+quest:read=64,recent=8,dense=1"
    text = "the rain fell on the hills, and so did some snow. " * 8
    return look(model, tokenizer, text, policy, name="tiny", max_new_tokens=6)


def test_what_the_last_step_read_is_what_the_report_says(viewed: Kept) -> None:
    assert viewed.read is not None and viewed.read[0] is None  # the dense layer
    for read, kept in zip(viewed.read[1:], viewed.positions[1:], strict=True):
        for mine, held in zip(read or (), kept, strict=True):
            assert set(mine) < set(held) and mine == sorted(mine)
            assert mine[-8:] == list(range(viewed.tokens_seen - 8, viewed.tokens_seen))
            assert len(mine) <= 64
    assert viewed.read[1] is not None
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page(viewed), re.S)[0])
    assert "reads" not in data["layers"][0]
    for made, read in zip(data["layers"], viewed.read, strict=True):
        for bits, positions in zip(made.get("reads", []), read or [], strict=True):
            number = int.from_bytes(base64.b64decode(bits), "little")
            assert [p for p in range(number.bit_length()) if number >> p & 1] == positions
    assert viewed.to_dict()["read"] == viewed.read


@pytest.mark.parametrize("policy", [QUEST, "leoam:recent=16", "quest:top=8,dense=1"])
def test_a_page_that_a_step_fills_was_read_by_it(policy: str) -> None:
    """Step by step, over more tokens than a page has."""
    model, ids = families.tiny(), helpers.prompt(1, 300)
    with kvpress.attach(model, policy) as engine, torch.inference_mode():
        cache = engine.new_cache()
        model(ids, cache=cache)
        assert read_positions(cache.states[1]) is None
        for step in range(40):
            model(ids[:, step : step + 1], cache=cache)
            state = cache.states[1]
            read = read_positions(state)
            assert read is not None
            assert [len(row) for row in read] == state.reads.last[1].read_r.tolist()
            assert all(row[-1] == 300 + step for row in read)


def test_a_policy_that_reads_everything_shows_no_reads(tiny_model: Path) -> None:
    model, tokenizer = models.load(str(tiny_model), device="cpu")
    made = look(model, tokenizer, "abc" * 9, "full", name="tiny", max_new_tokens=4)
    assert made.read is None and '"reads"' not in page(made)


NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_the_script_of_the_page_has_no_error_of_syntax(viewed: Kept, tmp_path: Path) -> None:
    (script,) = re.findall(r"<script>(.*)</script>", page(viewed), re.S)
    path = tmp_path / "page.js"
    path.write_text(script)
    subprocess.run([str(NODE), "--check", str(path)], check=True)


# ---- tables of the docs


def test_tables_are_made_of_what_was_recorded(
    tiny: tuple[Any, Writer], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, writer = tiny
    for module in (docs, docs_quality):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert {docs.PARTS[name]() for name in docs.PARTS} == {"Not recorded yet."}
    systems = [LocalSystem(model, name) for name in ("full", QUEST)]
    for file, tokens in ((docs.OFFLINE.format(2048), 2048), (docs.LONG, 7400)):
        tasks = [TASKS[name] for name in ("needle", "needles-2", "needles-4")]
        both = [(task, p) for task in tasks for p in ("hidden", "visible")]
        plans = [suites.Plan(task, 400, 1, protocol) for task, protocol in both]
        results = Results({}, {}, None)
        run.evaluate(systems[0], systems, writer, plans, results, How())
        cells = [replace(cell, tokens=tokens) for cell in results]
        head = {"format": 1, "settings": {}, "environment": {}}
        text = "".join(f"{json.dumps(x)}\n" for x in (head, *map(vars, cells)))
        (tmp_path / file).write_text(text)
    docs_quality.lines.cache_clear()
    needles = docs.PARTS["retrieval-needles"]().splitlines()
    assert needles[0].count("visible") == 3 and f"`{QUEST}`" in needles[3]
    assert "| – |" in needles[2] and needles[-1].startswith("| no context")
    assert "| needles-4 |" in docs.PARTS["retrieval-2048"]()
    docs_quality.lines.cache_clear()
    given = (Setting(model="tiny", rounds=1, warmup=0), *models.load(str(tiny_model), device="cpu"))
    place, names = Place("layer", 300, 1), ["full", "quest:read=128"]
    rows = layer.measure(*given, place, names, None, heads=2, group=2, width=32, read=200)
    named = {"bench": "layer", "tokens": 300, "batch": 1, "quality": []}
    made = [{**named, "candidate": name, **row} for name, row in rows.items()]
    (tmp_path / docs.LAYER).write_text("".join(f"{json.dumps(row)}\n" for row in made))
    assert "| `quest:read=128` |" in docs.PARTS["retrieval-layer"]()
    ranked = list(measure.measure(0, given_of(300), measure.How(reads=[64], queries=2)))
    record = {"rows": [row._asdict() for row in ranked]}
    (tmp_path / docs.RANKED).write_text(json.dumps(record))
    assert docs.PARTS["retrieval-rankings"]().count("\n") == 1 + len(RANKINGS)


def test_a_trace_shows_a_step_that_chooses_pages(tiny_model: Path, tmp_path: Path) -> None:
    out, policy = tmp_path / "trace.json", "leoam:read=0.3,recent=16"
    caps = ["--device", 0.75, "--host", 0.3, "--disk", f"1MiB:{tmp_path}"]
    words = ["--model", tiny_model, "--prompt", "x" * 900, "--policy", policy, "--trace", out]
    assert "Decode steps of 3 layers read" in " ".join(invoke("view", *words, *caps).split())
    events = [event for event in json.loads(out.read_text())["traceEvents"] if event["ph"] == "X"]
    assert [e["args"]["layer"] for e in events if e["cat"] == "attention"] == [0, 1, 2]
