"""`kvpress bench serving`: the same requests each time, the same tokens, and figures of events."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import helpers
import pytest
from kvpress.bench.common.models import Source
from kvpress.bench.docs import serving as tables
from kvpress.bench.serving import measure, report
from kvpress.bench.serving.heard import Heard, Round, most_at_once, percentile, spread
from kvpress.bench.serving.servers import Batched, OneByOne
from kvpress.bench.serving.theirs import Theirs
from kvpress.bench.serving.workload import Asked, Load, WorkloadError
from typer.testing import CliRunner

from kvpress.cli import app

LOAD = Load(requests=6, prompt=(20, 90), new=(3, 8), rate=50.0, seed=3)
POLICIES = ["full", "keyformer:budget=0.5", "snapkv:budget=0.5,window=8"]


def asked(load: Load = LOAD) -> list[Asked]:
    return load.make(helpers.prompt(1, 500, seed=1)[0].tolist())


# ---- requests


def test_a_seed_has_one_workload() -> None:
    assert asked() == asked()
    other = asked(Load(requests=6, prompt=(20, 90), new=(3, 8), rate=50.0, seed=4))
    assert other != asked()
    for lengths in ([len(x.ids) for x in asked()], [len(x.ids) for x in other]):
        assert sorted(lengths) == [20, 34, 48, 62, 76, 90]  # the same work for all seeds
    assert sum(x.new_tokens for x in other) == sum(x.new_tokens for x in asked())


def test_requests_arrive_one_after_the_other_or_all_at_once() -> None:
    moments = [one.at for one in asked()]
    assert moments[0] == 0.0 and moments == sorted(set(moments))
    at_once = Load(requests=6, prompt=(20, 90), new=(3, 8), rate=0.0, seed=3)
    assert [one.at for one in asked(at_once)] == [0.0] * 6


def test_arrivals_have_their_rate() -> None:
    load = Load(requests=2001, prompt=(1, 1), new=(1, 1), rate=4.0, seed=0)
    assert 2000 / load.make([5])[-1].at == pytest.approx(4.0, rel=0.1)


def test_prompts_follow_each_other_in_the_text() -> None:
    text = helpers.prompt(1, 500, seed=1)[0].tolist()
    whole = [token for one in asked() for token in one.ids]
    start = next(i for i in range(500) if (text + text)[i : i + len(whole)] == whole)
    assert 0 <= start < 500


@pytest.mark.parametrize("wrong", [{"prompt": (9, 8)}, {"new": (0, 2)}, {"rate": -1.0}])
def test_impossible_workloads_are_refused(wrong: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"requests": 2, "prompt": (8, 9), "new": (1, 2), "rate": 0.0}
    with pytest.raises(WorkloadError, match="at least"):
        Load(**{**fields, **wrong}, seed=0)


# ---- figures


def test_percentiles_stand_between_values_in_proportion() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert percentile(values, 0.5) == 3.0
    assert percentile(values, 0.95) == pytest.approx(4.8)
    assert percentile([7.0], 0.95) == 7.0 and math.isnan(percentile([], 0.5))


def test_figures_of_events_by_hand() -> None:
    first = Heard(arrived=0.0, begun=0.5, tokens=[1, 2, 3], times=[1.0, 1.5, 3.0])
    second = Heard(arrived=1.0, begun=2.0, tokens=[4, 5], times=[4.0, 4.5])
    third = Heard(arrived=4.5, begun=4.5, tokens=[6], times=[5.0])
    found = Round([first, second, third], 10).figures()
    assert found["first_p50"] == 1.0 and found["first_p95"] == pytest.approx(2.8)
    assert found["token_p50"] == 0.5 and found["token_p95"] == pytest.approx(1.4)
    assert found["running"] == 2 and found["bytes_held"] == 10


def test_who_ends_makes_room_for_the_next() -> None:
    assert most_at_once([(0, 2), (2, 3), (1, 2)]) == 2


def test_figures_that_no_round_has_are_none() -> None:
    found = spread([{"a": 1.0, "b": math.nan}, {"a": 3.0, "b": math.nan}, {"a": 2.0, "b": 4.0}])
    assert found["a"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert found["b"]["median"] == 4.0
    assert spread([{"b": math.nan}])["b"] == {"median": None, "low": None, "high": None}


# ---- who serves


@pytest.mark.parametrize("policy", POLICIES)
def test_the_batcher_draws_what_each_request_gets_alone(policy: str) -> None:
    model, found = helpers.sharp("llama"), []
    for server in (OneByOne(model, policy, 32), Batched(model, policy, 32, 4)):
        made = server.serve(asked())
        server.close()
        for one, own in zip(asked(), made.heard, strict=True):
            assert len(own.tokens) == len(own.times) == one.new_tokens
            assert own.arrived <= own.begun <= own.times[0] and own.times == sorted(own.times)
        assert made.bytes_held > 0
        found.append(made.tokens)
    assert found[0] == found[1]


def test_transformers_batching_draws_the_same_round_after_round() -> None:
    model = helpers.sharp("llama")
    alone = OneByOne(model, "full", 512)
    expected = alone.serve(asked()).tokens
    server = Theirs(model, asked(), 64)
    for _ in range(2):
        made = server.serve(asked())
        assert made.tokens == expected and made.bytes_held > 0
        assert all(own.arrived <= own.begun <= own.times[0] for own in made.heard)
    server.close()


def setting(**fields: Any) -> measure.Setting:
    usual: dict[str, Any] = {
        "source": Source("tiny"),
        "policies": ("full", "keyformer:budget=0.25"),
        "load": Load(requests=10, prompt=(200, 400), new=(4, 8), rate=0.0, seed=0),
        "rounds": 1,
        "warmup": 0,
        "chunk": 64,
        "running": 8,
        "batch_tokens": 64,
        "theirs": False,
        "caps": ("1MiB",),
        "threads": 1,
        "text": {},
    }
    return measure.Setting(**{**usual, **fields})


def test_a_cap_holds_and_more_compressed_requests_find_room() -> None:
    found = measure.capped(setting(), helpers.sharp("llama"), _Tokenizer())["1MiB"]
    for row in found.values():
        assert row["error"] is None and 0 < row["bytes_held"] <= row["cap"] == 2**20
    full, less = (found[name]["running"] for name in ("full", "keyformer:budget=0.25"))
    assert less > full >= 1


def test_what_can_never_fit_is_an_error_of_its_policy() -> None:
    small = setting(caps=("100KiB",), policies=("full",))
    found = measure.capped(small, helpers.sharp("llama"), _Tokenizer())
    assert "TooLargeError" in found["100KiB"]["full"]["error"]


class _Tokenizer:
    """Ids of any text."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": helpers.prompt(1, 3000)[0].tolist()}


def test_a_candidate_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("no room")

    monkeypatch.setattr(measure, "Theirs", broken)
    load = Load(requests=3, prompt=(20, 30), new=(2, 3), rate=0.0, seed=0)
    made = setting(policies=("full",), load=load, theirs=True)
    rows = measure.measure(made, helpers.sharp("llama"), _Tokenizer())
    assert rows[measure.THEIRS]["error"] == "RuntimeError: no room"
    assert rows[measure.THEIRS]["differ"] is None and rows["batched, full"]["differ"] == 0
    assert measure.over(rows, "batched, full", measure.THEIRS) is None


# ---- the command


def test_the_command_measures_all_and_writes_a_record(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "serving.json"
    sizes = ("--requests", "4", "--prompt", "80:200", "--new", "3:6", "--rate", "40")
    more = ("--rounds", "2", "--cap", "4MiB", "--chunk", "64")
    policies = ("--policy", "full", "--policy", "h2o:budget=0.5")
    done = CliRunner().invoke(
        app,
        [
            "bench",
            "serving",
            "--model",
            str(tiny_model),
            "--out",
            str(out),
            *sizes,
            *more,
            *policies,
        ],
    )
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    rows = record["candidates"]
    assert len(rows) == 5 and all(row["error"] is None for row in rows.values())
    assert all(row["differ"] == 0 and row["seconds"]["count"] == 2 for row in rows.values())
    assert record["settings"]["prompt"] == "80-200" and record["environment"]["threads"] >= 1
    made = report.report(record)
    assert [sheet.title for sheet in made.sheets] == ["Serving", "At once under 4MiB"]
    assert "h2o:budget=0.5" in tables.rounds(record)


@pytest.mark.parametrize("given", ["8:", "200:x", "1:2:3", "9:8"])
def test_lengths_that_are_no_two_numbers_are_refused(given: str) -> None:
    done = CliRunner().invoke(app, ["bench", "serving", "--model", "none", "--new", given])
    assert done.exit_code != 0


def test_the_tables_wait_for_their_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert [part() for part in tables.PARTS.values()] == [tables.MISSING]
