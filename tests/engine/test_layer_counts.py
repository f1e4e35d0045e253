"""Options that count layers: more than a model has are refused when it is attached."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import tiny

import kvpress
from kvpress.errors import PlanError, PolicyError

SPARES = ["quest:dense={}", "specontext:head=self,dense={}", "freekv:dense={}"]
COUNTS = [*SPARES, "leoam:early_layers={}", "d2o:full_first={}", "d2o:full_last={}"]
ANY = "d2o:exact_mean=false,budget=64,full_first={},full_last={}"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", num_hidden_layers=4)


def refused(model: Any, spec: str) -> str:
    before = model.config._attn_implementation
    with pytest.raises(PolicyError) as raised:
        kvpress.attach(model, spec)
    assert model.config._attn_implementation == before and kvpress.engine_of(model) is None
    return str(raised.value)


@pytest.mark.parametrize("spec", COUNTS)
def test_more_layers_than_there_are(model: Any, spec: str) -> None:
    said = refused(model, spec.format(99))
    assert f"{spec.split(':')[1].split(',')[-1].format(99)}" in said
    assert "4 layers. Give a number below 4" in said


@pytest.mark.parametrize("spec", SPARES)
def test_a_policy_that_would_do_nothing(model: Any, spec: str) -> None:
    assert "all 4 layers of this model" in refused(model, spec.format(4))
    kvpress.attach(model, spec.format(3)).detach()


def test_budgets_that_would_be_those_of_no_layer(model: Any) -> None:
    assert "would keep everything" in refused(model, ANY.format(3, 1))
    kvpress.attach(model, ANY.format(2, 1)).detach()


def test_only_layers_without_a_window_count() -> None:
    """Of the others a policy changes nothing anyway."""
    model = tiny("gemma3")
    kinds = kvpress.hf.support.check_model(model).kinds
    (*_, last) = [kind.index for kind in kinds if kind.window is None]
    kvpress.attach(model, f"quest:dense={last}").detach()
    assert "read everything" in refused(model, f"quest:dense={last + 1}")
    sliding = tiny("mistral-sliding")
    kvpress.attach(sliding, "quest:dense=1").detach()  # nothing could be chosen there at all


def test_the_planner_passes_over_what_would_do_nothing(model: Any) -> None:
    with pytest.raises(PlanError, match="all 4 layers of this model"):
        kvpress.attach(model, "quest:dense=4", memory="64GiB", length=600)
