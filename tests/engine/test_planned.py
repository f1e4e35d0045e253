"""`attach(memory=)`: what is chosen, what is said, and what is refused before it exceeds it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import growing
import pytest
import torch
from helpers import prompt, tiny

import kvpress
from kvpress import PlanError
from kvpress.hf import planning
from kvpress.pipe.state import heap

MIB = 2**20
BASE = 500 * MIB  # that the process is said to hold: what it really does changes with every test
LENGTH, BATCH = 3000, 8  # of which 128 are decoded
TEXTS = {"length": LENGTH, "batch": BATCH, "new_tokens": 128}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A tiny model, in a process that holds BASE."""
    monkeypatch.setattr(planning, "resident", lambda model: BASE)
    made = tiny("llama", max_position_embeddings=4096)
    yield made
    kvpress.detach(made)


def chosen(model: Any, mib: int, **given: Any) -> Any:
    """The plan for so many MiB beyond what is there."""
    with kvpress.attach(model, memory=BASE + mib * MIB, **{**TEXTS, **given}) as engine:
        return engine.plan


def generate(engine: Any, ids: torch.Tensor, new: int = 4, **given: Any) -> torch.Tensor:
    out: torch.Tensor = engine.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **given
    )
    return out


def test_less_memory_means_smaller_chunks_then_a_policy_that_does_more_harm(model: Any) -> None:
    plans = [chosen(model, mib) for mib in (400, 160, 142, 125, 112)]
    kinds = [plan.chosen.kind for plan in plans]
    order = ["full", "packed", "evicting"]
    assert [order.index(kind) for kind in kinds] == sorted(order.index(kind) for kind in kinds)
    assert set(kinds) == set(order)
    assert plans[0].chunk is None and plans[1].chunk is not None
    for plan in plans:
        assert plan.chosen.needed <= plan.memory.given


def test_the_budget_of_an_evicting_policy_is_the_largest_that_fits(model: Any) -> None:
    budgets = [chosen(model, mib).policy for mib in (112, 118, 130)]
    found = [int(spec.partition("budget=")[2].partition("+")[0]) for spec in budgets]
    assert found == sorted(set(found)), budgets


def test_the_host_takes_what_does_not_fit_before_anything_is_lost(model: Any) -> None:
    given = {**TEXTS, "length": 12_000, "host": "1GiB"}
    with kvpress.attach(model, memory=BASE + 120 * MIB, **given) as engine:
        assert (engine.plan.chosen.kind, engine.plan.chosen.tiered) == ("full", True)
        assert engine.spec.tiers.caps.device == engine.plan.chosen.device < 120 * MIB


def test_what_was_chosen_and_why_is_said(model: Any) -> None:
    with kvpress.attach(model, memory=BASE + 142 * MIB, **TEXTS) as engine:
        generate(engine, prompt(2, 300))
        said = str(engine.plan)
        assert said in engine.report().notes
    assert f"Planned for 8 sequences of {LENGTH:,} tokens" in said
    assert "Not chosen: full needs" in said and "500MiB were there before" in said


def test_generate_reads_in_chunks_and_gives_the_tokens_of_one_pass(model: Any) -> None:
    ids = prompt(2, 900)
    with kvpress.attach(model, "full") as engine:
        wanted = generate(engine, ids)
    with kvpress.attach(model, memory=BASE + 150 * MIB, **TEXTS) as engine:
        assert engine.plan.policy == "full" and engine.plan.chunk < 900
        assert torch.equal(generate(engine, ids), wanted)
        with pytest.raises(PlanError, match="tokens at once are more than"):
            model(prompt(2, 2000))


def test_a_policy_beside_memory_is_kept(model: Any) -> None:
    plan = chosen(model, 400, policy="snapkv:budget=0.5")
    assert plan.policy.startswith("snapkv:budget=0.5") and plan.chosen.kind == "given"
    with pytest.raises(PlanError, match="Give at least memory="):
        chosen(model, 105, policy="full")


def test_a_plan_that_cannot_fit_says_which_memory_would(model: Any) -> None:
    with pytest.raises(PlanError) as raised:
        chosen(model, 90)
    least = str(raised.value).partition("Give at least memory=")[2].partition(",")[0]
    assert least.endswith("MiB") and "500MiB are there" in str(raised.value)
    with kvpress.attach(model, memory=least, **TEXTS) as engine:
        assert engine.plan.chosen.fits
    with pytest.raises(PlanError):
        kvpress.attach(model, memory=int(least[:-3]) * MIB - 2 * MIB, **TEXTS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"memory": "8 apples"}, "memory='8 apples' is no size"),
        ({"memory": 0}, "memory=0 is no size"),
        ({"memory": True}, "memory=True is no size"),
        ({"memory": "8GiB", "length": 0}, "length=0 must be"),
        ({"memory": "8GiB", "batch": 0}, "batch=0 must be"),
        ({"memory": "8GiB", "length": 100, "new_tokens": 100}, "leave at least one"),
        ({"memory": "8GiB", "device": "1GiB"}, "Leave one of them out"),
        ({"length": 4000}, "there is no memory="),
        ({}, "there is no memory="),
    ],
    ids=str,
)
def test_bad_input_is_an_error_with_numbers(model: Any, given: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        kvpress.attach(model, **given)
    assert kvpress.engine_of(model) is None


def test_without_a_length_the_longest_that_the_model_takes_is_planned(model: Any) -> None:
    with kvpress.attach(model, memory="8GiB") as engine:
        assert engine.plan.texts == (1, 4096, 256)


def test_what_was_not_planned_for_is_refused_before_it_is_read(model: Any) -> None:
    given = {"length": 400, "batch": 2, "new_tokens": 16}
    with kvpress.attach(model, memory="8GiB", **given) as engine:
        with pytest.raises(PlanError, match="length=405"):
            generate(engine, prompt(1, 400), 5)
        with pytest.raises(PlanError, match="batch=3"):
            generate(engine, prompt(3, 100))
        with pytest.raises(PlanError, match="beams"):
            generate(engine, prompt(1, 100), num_beams=3)
        with pytest.raises(PlanError, match="401 tokens"):
            cache = engine.new_cache()
            for ids in (prompt(1, 400), prompt(1, 1)):
                model(ids, past_key_values=cache)


def test_caches_that_are_still_held_count(model: Any) -> None:
    with kvpress.attach(model, memory="8GiB", length=400, batch=2, new_tokens=16) as engine:
        held = engine.new_cache()
        model(prompt(2, 50), past_key_values=held)
        with pytest.raises(PlanError, match="other caches still hold 2"):
            model(prompt(1, 50))
        del held
        engine.new_cache()
        generate(engine, prompt(2, 50))
        generate(engine, prompt(2, 50))  # the cache of the call before is gone by then


def test_decoded_tokens_that_all_stay_are_as_many_as_were_planned(model: Any) -> None:
    given = {"length": 2000, "batch": 1, "new_tokens": 8}
    with kvpress.attach(model, "snapkv:budget=64", memory="8GiB", **given) as engine:
        generate(engine, prompt(1, 300), 8)
        with pytest.raises(PlanError, match="new_tokens=8"):
            generate(engine, prompt(1, 300), 9)
        generate(engine, prompt(1, 20), 30)  # so short a text keeps no more


def test_the_process_stays_within_what_was_given(demo: Any) -> None:
    """On the real model, in a process of its own, from its start on."""
    from kvpress.bench.common.models import Source
    from kvpress.bench.plan.peaks import measure

    asked = {"memory": "1250MiB", "length": 600, "batch": 2, "new_tokens": 4}
    row = measure(Source(), asked, 1)
    assert row["error"] is None
    plan = row["plan"]
    assert row["bytes_peak"] <= plan["memory"]["given"] == 1250 * MIB
    held = sum(plan["chosen"]["bytes"][name] for name in ("pages", "beside"))
    assert abs(held - row["bytes_held"]) <= 0.02 * held


@pytest.mark.skipif(heap._malloc_trim() is None, reason="the C library gives nothing back")
def test_pools_that_grow_chunk_by_chunk_leave_nothing_behind() -> None:
    """Beside 419 MB of keys and values 165 MB were held without it, and 74 MB are with it."""
    tools = Path(growing.__file__)
    done = subprocess.run([sys.executable, tools.name], cwd=tools.parent, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["held"] > 400e6
    assert found["beside"] <= found["passing"]


def test_a_retrieval_head_is_planned_with_the_keys_of_all_tokens(model: Any) -> None:
    """What a cache holds in the end is what was planned, growth included."""
    spec, texts = "specontext:head=self", {"length": 1000, "batch": 2, "new_tokens": 16}
    with kvpress.attach(model, spec, memory=BASE + 400 * MIB, **texts) as engine:
        generate(engine, prompt(2, 984), 16)
        held = engine.cache.context.outlook.nbytes
        chosen = engine.plan.chosen
        assert "retrieval head" in str(engine.plan)
        assert 0.9 * chosen.head <= held <= chosen.head
        least = chosen.passing + chosen.head + chosen.bytes.held + chosen.bytes.waiting
        assert chosen.needed == BASE + least


def test_a_head_that_does_not_fit_the_model_is_none_to_plan_with(model: Any) -> None:
    with pytest.raises(PlanError, match="no distilled head ships"):
        kvpress.attach(model, "specontext", memory=BASE + 400 * MIB, **TEXTS)


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("jamba", "states of linear attention"),
        ("llama4", "within chunks"),
        ("gemma3n", "several layers read"),
        ("gpt_oss", "learned sinks"),
    ],
)
def test_what_is_not_planned_for_is_refused(family: str, what: str) -> None:
    """Bytes that nobody counted beforehand would break the promise."""
    if family not in families.FAMILIES:
        pytest.skip("this transformers has no such family")
    with pytest.raises(PlanError, match=what):
        kvpress.attach(families.tiny(family), memory="64GiB", length=64)
