"""`kvpress bench decode`, `prefill`, `throughput`, `memory`: cells, rows, runs that go on."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from kvpress.bench.commands import bench
from kvpress.bench.common import candidates, models, progress, prompt
from kvpress.bench.common.journal import Journal, JournalError, read
from kvpress.bench.common.prompt import PromptError
from kvpress.bench.common.timing import Samples
from kvpress.bench.speed import benches, grid, memory, prefill
from kvpress.bench.speed import report as speed_report
from kvpress.bench.speed.memory import largest
from kvpress.bench.speed.options import with_budgets
from kvpress.bench.speed.rounds import run_rounds
from kvpress.bench.speed.rows import Cell, by_cell
from kvpress.bench.speed.setting import Setting
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.errors import PolicyError

NAMES = ["transformers", "full", "h2o:budget=0.5"]
SETTING = Setting(model="tiny", rounds=3, warmup=1, new_tokens=4)
FACTS = {"device": "cpu", "cpu": "a processor"}


def measured(name: str, batch: int, tokens: int = 96) -> dict[str, Any]:
    ids = helpers.prompt(batch, tokens)
    cell = Cell(name, tokens, batch)
    return benches.timed(
        SETTING, benches.LocalCandidates(), helpers.tiny("llama"), ids, cell, NAMES
    )


# ---- what is measured


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", list(benches.TIMED))
def test_every_candidate_has_its_rounds_and_its_bytes(name: str, batch: int) -> None:
    rows = measured(name, batch)
    assert list(rows) == NAMES and not torch.is_inference_mode_enabled()
    seen = 96 + {"decode": 4, "prefill": 0, "throughput": 3}[name]
    assert rows["transformers"]["bytes_held"] == batch * 3 * 2 * 2 * 16 * seen * 4
    assert rows["h2o:budget=0.5"]["bytes_held"] < 0.7 * rows["full"]["bytes_held"]
    done = {"decode": 1, "prefill": 96, "throughput": 4}[name]
    for row in rows.values():
        assert row["error"] is None and row["seconds"]["count"] == 3
        rate = batch * done / row["seconds"]["median"]
        assert row["tokens_per_second"] == pytest.approx(rate)


def test_the_stages_of_a_round_are_part_of_its_time() -> None:
    for row in list(measured("prefill", 1).values())[1:]:
        for number, seconds in enumerate(row["seconds"]["seconds"]):
            taken = [row["stages"][stage]["seconds"][number] for stage in prefill.STAGES]
            assert 0 < sum(taken) < seconds
        assert row["stages"]["prefill attention"]["low"] > 0
    rows = measured("decode", 1)
    assert rows["transformers"]["attention"] is None
    for row in list(rows.values())[1:]:
        pairs = zip(row["attention"]["seconds"], row["seconds"]["seconds"], strict=True)
        assert all(0 < attention < step for attention, step in pairs)


def test_the_engine_takes_the_token_that_transformers_takes() -> None:
    model, ids = helpers.tiny("llama"), helpers.prompt(2, 40)
    with torch.inference_mode():
        expected = model(ids).logits[:, -1].argmax(-1)
        for name in NAMES:
            measurement = prefill.measurement(SETTING, model, ids, 2, name)
            assert torch.equal(measurement.round(0), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_is_freed_between_rounds_not_in_them(name: str) -> None:
    measurement = prefill.measurement(
        SETTING, helpers.tiny("llama"), helpers.prompt(1, 40), 1, name
    )
    with torch.inference_mode():
        measurement.round(0)
    used = weakref.ref(measurement._cache)
    measurement.settle(timed=True)
    assert used() is None


@pytest.mark.parametrize("name", ["transformers", "full"])
def test_a_candidate_shares_the_weights_and_leaves_the_model_alone(name: str) -> None:
    model = helpers.tiny("llama")
    before = dict(model.config.to_dict()), model.config._attn_implementation
    own = candidates.candidate(model, name).model
    pairs = zip(own.parameters(), model.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert own.config is not model.config and own is not model
    assert (model.config.to_dict(), model.config._attn_implementation) == before


def test_percentiles_of_a_hundred_seconds() -> None:
    taken = Samples([float(n) for n in range(101)])
    assert (taken.median, taken.p95, taken.quartiles) == (50.0, 95.0, (25.0, 75.0))
    assert Samples([2.0]).p95 == 2.0


def test_prompts_are_consecutive_and_fit_the_positions(tiny_model: Path) -> None:
    model, tokenizer = models.load(str(tiny_model), device="cpu")
    made = prompt.prompts(model, tokenizer, 1000, 3, new_tokens=24)
    assert made.shape == (3, 1000) and len({tuple(row) for row in made.tolist()}) == 3
    whole = prompt.prompts(model, tokenizer, 750, 4, new_tokens=1)
    assert torch.equal(made.flatten(), whole.flatten())
    with pytest.raises(PromptError, match="exceed the model's 1024 positions"):
        prompt.prompts(model, tokenizer, 1000, 1, new_tokens=25)


# ---- tables


def row(seconds: float, **more: Any) -> dict[str, Any]:
    taken = Samples([seconds]).to_dict()
    return {"seconds": taken, "error": None, "bytes_held": 100, "quality": [], **more}


def test_ratios_are_those_of_the_medians() -> None:
    stages = dict.fromkeys(prefill.STAGES, Samples([0.0]).to_dict())
    full = row(2.0, stages=stages | {prefill.ATTENTION: Samples([1.0, 2.0, 9.0]).to_dict()})
    taken = {prefill.ATTENTION: Samples([4.0]).to_dict(), prefill.OBSERVE: Samples([1.0]).to_dict()}
    assert prefill.scoring(row(6.0, stages=stages | taken), full) == 2.5
    assert prefill.scoring(row(6.0, stages={}), full) is None
    assert prefill.scoring(full, None) is None


def test_a_table_shows_speed_ups_and_what_bytes_allow() -> None:
    step = {"tokens_per_second": 1.0, "bytes_weights": 300}
    rows = [
        row(3.0, **step, attention=None) | {"candidate": "transformers"},
        row(2.0, **step, attention=Samples([1.0]).to_dict()) | {"candidate": "full"},
        row(1.5, **step, attention=Samples([0.8]).to_dict())
        | {"candidate": "h2o", "bytes_held": 20},
        {"candidate": "broken", "error": "ValueError: no", "quality": []},
    ]
    cell = {"bench": "decode", "tokens": 8, "batch": 1}
    (sheet,) = benches.sheets_of([cell | r for r in rows])
    assert sheet.lines[2][-3:] == ("2.00×", "1.33× (1.25)", "1.25× (5.00)")
    assert sheet.lines[3][:2] == ("broken", "failed") and sheet.notes == ("broken: ValueError: no",)
    assert len({len(line) for line in (*sheet.lines, sheet.head)}) == 1


# ---- candidates that fail, and runs that go on


class Fragile:
    """Fails in the round with a number."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.rounds = at, 0

    def round(self, number: int) -> None:
        self.rounds += 1
        if number == self.at:
            raise MemoryError("no more")

    def settle(self, timed: bool) -> None: ...

    def row(self, taken: Samples) -> dict[str, Any]:
        return {"rounds": self.rounds}


def test_a_candidate_that_fails_leaves_a_row_and_the_others_go_on() -> None:
    def broken() -> Fragile:
        raise ValueError("cannot start")

    starts: dict[str, Callable[[], Fragile]] = {
        "good": Fragile,
        "late": partial(Fragile, 2),
        "broken": broken,
    }
    rows = run_rounds(starts, rounds=4, warmup=1)
    assert rows["good"] == {"seconds": rows["good"]["seconds"], "rounds": 5, "error": None}
    assert rows["late"] == {"error": "MemoryError: no more"}
    assert rows["broken"] == {"error": "ValueError: cannot start"}


def test_a_run_goes_on_with_the_cells_that_are_missing_or_failed(tmp_path: Path) -> None:
    path, measured = tmp_path / "rows.jsonl", []

    def measure(cell: Cell, names: list[str]) -> dict[str, Any]:
        measured.append(cell.tokens)
        failed = cell.tokens == 20 and measured.count(20) == 1
        return {name: {"value": cell.tokens, "error": "x" if failed else None} for name in names}

    def run(lengths: list[int], names: list[str], setting: Setting = SETTING) -> list[Any]:
        cells = grid.cells("decode", lengths, [1])
        return grid.fill(Journal(path), cells, names, measure, setting, FACTS)

    run([10, 20], ["a", "b"])
    path.write_text(path.read_text() + '{"half of a li')  # as if the process had died here
    rows = run([10, 20, 30], ["a", "b"])
    assert measured == [10, 20, 20, 30] and [r["value"] for r in rows] == [10, 10, 20, 20, 30, 30]
    assert run([10, 20, 30], ["a", "b"]) == rows and len(measured) == 4
    run([10], ["a", "b", "c"])  # ratios are of one run: all of the cell again
    run([10], ["a"], Setting(model="tiny", rounds=9))
    assert measured[4:] == [10, 10]
    assert len(read(path)) == 4 + 2 + 2 + 3 + 1
    together = {cell.tokens: list(found) for cell, found in by_cell(read(path)[:-1]).items()}
    assert together == {10: ["a", "b", "c"], 20: ["a", "b"], 30: ["a", "b"]}
    newest = by_cell(read(path))[Cell("decode", 10, 1)]  # never beside rows of other settings
    assert list(newest) == ["a"] and newest["a"]["settings"]["rounds"] == 9


def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for text in ("no json\n", "[1]\n"):
        path.write_text(text)
        with pytest.raises(JournalError, match="Give another file"):
            Journal(path)
        assert path.read_text() == text


# ---- memory


@pytest.mark.parametrize("precision", [None, 16])
@pytest.mark.parametrize("limit", [None, 700])
@pytest.mark.parametrize("bend", [0.0, 0.004])
def test_the_largest_that_fits_is_found_in_few_trials(
    precision: int | None, limit: int | None, bend: float
) -> None:
    for cap in (3, 50, 101, 499, 1000, 12345):
        trials: list[int] = []

        def peak(number: int, trials: list[int] = trials, cap: int = cap) -> float:
            trials.append(number)
            used = 40 + 3 * number + bend * number**2
            return math.inf if used > 2 * cap else used

        found = largest(peak, cap, 1, limit, precision)
        right = max((n for n in range(limit or 9000) if 40 + 3 * n + bend * n**2 <= cap), default=0)
        if limit is not None and 40 + 3 * limit + bend * limit**2 <= cap:
            right = limit
        assert right - max(1, found // 16) * bool(precision) <= found <= right
        assert len(trials) <= 13 and max(trials) <= (limit or math.inf)


def test_memory_counts_the_bytes_of_a_process_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "memory.jsonl"
    options = ["--model", str(tiny_model), "--tokens", "400", "--batch", "2", "--threads", "1"]
    options += ["--policy", "h2o:budget=0.2", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(bench, ["memory", *options])
    assert done.exit_code == 0, done.output
    rows = {row["candidate"]: row for row in read(out)}
    assert set(rows) == {"transformers", "h2o:budget=0.2"}
    for found in rows.values():
        assert found["error"] is None, found["error"]
        assert found["bytes_peak_prefill"] >= found["bytes_before"] > 50 << 20
    assert rows["transformers"]["bytes_held"] == 2 * 3 * 2 * 2 * 16 * 403 * 4
    assert rows["h2o:budget=0.2"]["bytes_held"] < 0.3 * rows["transformers"]["bytes_held"]


@pytest.mark.parametrize("name", NAMES)
def test_a_trial_does_not_count_what_the_one_before_held(name: str) -> None:
    own, ids = candidates.candidate(helpers.tiny("llama"), name), helpers.prompt(1, 64)
    with torch.inference_mode():
        used = own.read(ids, 4)
    gone = weakref.ref(used)
    del used
    memory._fresh_peak(own, torch.device("cpu"))
    assert gone() is None


# ---- the command line


def test_the_command_writes_rows_with_all_that_they_need(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "prefill.jsonl"
    options = ["--tokens", "160", "--tokens", "200", "--batch", "2", "--rounds", "2"]
    options += ["--model", str(tiny_model), "--cache-dtype", "bfloat16", "--device", "cpu"]
    options += ["--warmup", "0", "--out", str(out), "--with-eval", "--policy", "full"]
    options += ["--policy", "h2o", "--budget", "0.5", "--budget", "0.25"]
    done = CliRunner().invoke(bench, ["prefill", *options])
    assert done.exit_code == 0, done.output
    rows = read(out)
    names = ["transformers", "full", "h2o:budget=0.5", "h2o:budget=0.25"]
    assert [(r["tokens"], r["candidate"]) for r in rows] == [
        (tokens, name) for tokens in (160, 200) for name in names
    ]
    for found in rows:
        assert found["batch"] == 2 and found["seconds"]["count"] == 2
        assert found["environment"]["versions"]["torch"] == torch.__version__
        assert found["settings"]["storage"] == "bfloat16"
        (asked,) = found["quality"]
        assert asked["task"] == "copy" and 0 <= asked["low"] <= asked["score"] <= asked["high"] <= 1
    assert rows[1]["bytes_held"] < 0.6 * rows[0]["bytes_held"]
    again = CliRunner().invoke(bench, ["prefill", *options])
    assert again.stdout == done.stdout and len(read(out)) == len(rows)
    assert "Nothing was measured" in again.stderr and "Nothing" not in done.output
    for name, starts in (("page.html", b"<!doctype html>"), ("page.md", b"# Time and memory")):
        done = CliRunner().invoke(app, ["report", str(out), "--out", str(tmp_path / name)])
        assert done.exit_code == 0 and (tmp_path / name).read_bytes().startswith(starts)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1 and page.count("<table>") == 2 and "copy %" in page
    done = CliRunner().invoke(app, ["plot", str(out), "--out", str(tmp_path / "plot.png")])
    assert done.exit_code == 0 and (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_lines_are_drawn_where_only_one_thing_changes() -> None:
    cells = [Cell("decode", t, b) for t in (100, 200) for b in (1, 4)]
    cells.append(Cell("prefill", 100, 1))
    panels = [(axis, [tuple(c[1:]) for c in line]) for axis, line in speed_report.lines_of(cells)]
    assert panels == [
        ("tokens", [(100, 1), (200, 1)]),
        ("tokens", [(100, 4), (200, 4)]),
        ("batch", [(100, 1), (100, 4)]),
        ("batch", [(200, 1), (200, 4)]),
    ]


def test_budgets_go_to_the_policies_that_take_one_and_name_none() -> None:
    given = ["full", "h2o", "h2o:budget=0.3", "snapkv:window=8", "transformers-fp8"]
    assert list(with_budgets(given, ["0.5", "64"])) == [
        "full",
        "h2o:budget=0.5",
        "h2o:budget=64",
        "h2o:budget=0.3",
        "snapkv:window=8,budget=0.5",
        "snapkv:window=8,budget=64",
        "transformers-fp8",
    ]


@pytest.mark.parametrize("name", [name for name in benches.BENCHES if name != "layer"])
def test_a_wrong_option_is_refused_before_a_model_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.Source, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    done = CliRunner().invoke(bench, [name, "--policy", "no-such-policy"])
    assert isinstance(done.exception, PolicyError)
    for options in (["--cache-dtype", "int4"], ["--device", "tpu"], ["--out", "/no/such/x.json"]):
        assert CliRunner().invoke(bench, [name, *options]).exit_code == 2


def test_the_remaining_time_is_known_after_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    bar = progress.bar()
    monkeypatch.setattr(bar, "get_time", lambda: now[0])
    task = progress.start(bar, total=8)
    for done in range(1, 8):  # a round of a long prompt takes longer than rich looks back
        now[0] += 100
        bar.advance(task)
        assert bar.tasks[0].time_remaining == pytest.approx(100 * (8 - done))
