"""`kvpress bench prefill`: fresh caches every round, stages per round, ratios of medians."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from kvpress.bench import candidates, models, prefill, progress
from kvpress.bench.commands import bench
from kvpress.bench.run import PromptError
from kvpress.bench.timing import Samples
from typer.testing import CliRunner

from kvpress.errors import PolicyError

POLICIES = ["full", "h2o:budget=0.5"]


def row(name: str, seconds: list[float], **stages: list[float]) -> prefill.PrefillRow:
    given = {"prefill attention": stages.get("attention"), "observe": stages.get("observe")}
    given |= {"select": [0.0], "store": [0.0]}
    taken = {stage: Samples(values) for stage, values in given.items() if values and stages}
    return prefill.PrefillRow(
        candidate=name,
        prompt_tokens=8,
        first_token=Samples(seconds),
        stages=taken,
        bytes_cache=1,
    )


def test_ratios_are_those_of_the_medians() -> None:
    rows = [
        row("transformers", [9.0, 3.0, 1.0]),
        row("full", [2.0, 40.0, 1.0], attention=[7.0, 2.0, 1.0], observe=[0.0]),
        row("h2o", [6.0, 5.0, 90.0], attention=[9.0, 1.0, 4.0], observe=[1.0, 50.0, 0.5]),
    ]
    assert [prefill.against_full(r, rows) for r in rows] == [1.5, 1.0, 3.0]
    assert [prefill.scoring(r, rows) for r in rows] == [None, 1.0, 2.5]
    assert prefill.against_full(rows[0], rows[::2]) is None
    assert prefill.scoring(rows[2], rows[::2]) is None
    written = prefill.to_dicts(rows)[2]
    assert written["first_token_over_full"] == 3.0
    assert written["attention_and_observe_over_full_attention"] == 2.5
    assert written["stages"]["observe"]["median_seconds"] == 1.0
    cells = [list(column.cells) for column in prefill.table(rows).columns]
    assert cells[3] == ["1.50×", "1.00×", "3.00×"] and cells[-1] == ["–", "1.00×", "2.50×"]


def test_every_round_reads_the_whole_prompt_into_an_empty_cache() -> None:
    rounds: list[int] = []
    model, ids = helpers.tiny("llama"), helpers.prompt(1, 96)
    rows = prefill.measure(model, ids, POLICIES, 3, 1, None, rounds.append)
    assert rounds == [0, 1, 2, 3]
    held = {r.candidate: r.bytes_cache for r in rows}
    assert held["transformers"] == 3 * 2 * 2 * 16 * 96 * 4  # one round's tokens, not all rounds'
    assert held["h2o:budget=0.5"] < 0.7 * held["full"]
    for r in rows:
        assert r.first_token.count == 3 and r.prompt_tokens == 96
        assert set(r.stages) == (set() if r.candidate == "transformers" else set(prefill.STAGES))
    assert not torch.is_inference_mode_enabled()


def test_the_stages_of_a_round_are_part_of_its_time() -> None:
    rows = prefill.measure(helpers.tiny("llama"), helpers.prompt(1, 96), POLICIES, 3, 1)
    for r in rows[1:]:
        for number, seconds in enumerate(r.first_token.seconds):
            taken = [r.stages[stage].seconds[number] for stage in prefill.STAGES]
            assert 0 < sum(taken) < seconds
        assert r.stages["prefill attention"].low > 0
        assert r.stages["observe"].low > 0


def test_the_engine_takes_the_token_that_transformers_takes() -> None:
    model, ids = helpers.tiny("llama"), helpers.prompt(2, 40)
    with torch.inference_mode():
        expected = model(ids).logits[:, -1].argmax(-1)
        for name in ("transformers", *POLICIES):
            rival = prefill._Rival(candidates.candidate(model, name), ids)
            assert torch.equal(rival.first_token(0), expected)


@pytest.mark.parametrize("name", ["transformers", *POLICIES])
def test_a_cache_is_freed_between_rounds_not_in_them(name: str) -> None:
    rival = prefill._Rival(candidates.candidate(helpers.tiny("llama"), name), helpers.prompt(1, 40))
    with torch.inference_mode():
        rival.first_token(0)
    used = weakref.ref(rival.cache)
    rival.settle(timed=True)
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


def test_a_prompt_that_the_model_has_no_positions_for_is_refused(tiny_model: Path) -> None:
    model, tokenizer = models.load(str(tiny_model), device="cpu")
    given = candidates.prompt_ids(model, tokenizer, 1000, new_tokens=1).shape[1]
    assert 1000 <= given <= 1002
    candidates.prompt_ids(model, tokenizer, 1000, new_tokens=1024 - given)
    with pytest.raises(PromptError, match="exceed the model's 1024 positions"):
        candidates.prompt_ids(model, tokenizer, 1000, new_tokens=1025 - given)


def test_the_command_writes_what_it_measured(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "prefill.json"
    options = ["--tokens", "160", "--rounds", "2", "--warmup", "0", "--device", "cpu"]
    options += ["--model", str(tiny_model), "--cache-dtype", "bfloat16", "--out", str(out)]
    done = CliRunner().invoke(bench, ["prefill", *options])
    assert done.exit_code == 0, done.output
    results: dict[str, Any] = json.loads(out.read_text())
    assert results["environment"]["device"] == "cpu"
    assert results["settings"] == {
        "model": str(tiny_model),
        "rounds": 2,
        "warmup": 0,
        "cache_dtype": "bfloat16",
    }
    names = [r["candidate"] for r in results["rows"]]
    assert names == ["transformers", *prefill.POLICIES]
    for r in results["rows"]:
        assert len(r["seconds"]) == 2 and abs(r["prompt_tokens"] - 160) <= 4
    by_name = {r["candidate"]: r for r in results["rows"]}
    full = by_name["full"]["median_seconds"]
    for r in results["rows"]:
        assert r["first_token_over_full"] == pytest.approx(r["median_seconds"] / full)
    assert by_name["full"]["bytes_cache"] < 0.6 * by_name["transformers"]["bytes_cache"]


def test_a_wrong_option_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    done = CliRunner().invoke(bench, ["prefill", "--policy", "no-such-policy"])
    assert isinstance(done.exception, PolicyError)
    for options in (["--cache-dtype", "int4"], ["--device", "tpu"], ["--out", "/no/such/x.json"]):
        assert CliRunner().invoke(bench, ["prefill", *options]).exit_code == 2


def test_the_remaining_time_is_known_after_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    bar = progress.bar()
    monkeypatch.setattr(bar, "get_time", lambda: now[0])
    task = progress._start(bar, total=8)
    for done in range(1, 8):  # a round of a long prompt takes longer than rich looks back
        now[0] += 100
        bar.advance(task)
        assert bar.tasks[0].time_remaining == pytest.approx(100 * (8 - done))
