"""What becomes of the attention that slots receive: sums and largest weights, by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import helpers
import pytest
import torch

import kvpress
from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.formulas.sums import Observation, over_group, step_sums
from kvpress.ops import Logits, Noise, Reduction
from kvpress.policy import Budget, Policy, Slots, Step, option
from kvpress.types import Rank

# Of a sink, a context of two tokens, and their repetition: logits of two query heads.
LOGITS = torch.tensor(
    [
        [[1.0, 2, 0, 0, 0], [0, 0, 3, 1, 0]],
        [[2.0, 0, 1, 0, 0], [1, 1, 0, 0, 2]],
    ]
)


def largest(weight_BQ: torch.Tensor | None = None) -> torch.Tensor:
    """Of each query head: keys are the axes, so that a query is its logits."""
    key, position = torch.eye(5)[None, None], torch.arange(5)[None, None]
    choices = (Logits(1.0), Reduction(2, True, weight_BQ), Noise("none", 1.0, 0, 0))
    return ops.attention_sums(LOGITS[None], key, position, *choices)


def test_worked_example_of_the_largest_weight() -> None:
    """KVzip (arXiv 2505.23416): the score of the context, by its repetition."""
    score = over_group(largest(), 1, "max")[0, 0, 1:3]
    torch.testing.assert_close(score, torch.tensor([0.61030, 0.77839]), rtol=0, atol=1e-5)


def test_worked_example_with_norms_of_outputs_and_inputs() -> None:
    """KVzip+ (arXiv 2601.07891): |h| of the queries, |W v| of the slots of each query head."""
    part = largest(1 / torch.tensor([[2.0, 4.0]]))[..., 1:3] * torch.tensor([[1.0, 3], [2, 1]])
    score = over_group(part, 1, "max")[0, 0]
    torch.testing.assert_close(score, torch.tensor([0.30515, 0.58380]), rtol=0, atol=1e-5)


def test_a_step_is_the_last_query_of_a_prompt() -> None:
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    position = torch.arange(9).repeat(2, 2, 1)
    choices = (Logits(1.0), Reduction(1, True), Noise("none", 1.0, 0, 0))
    last = over_group(ops.attention_sums(query, key, position, *choices), 2, "max")
    logits = torch.einsum("bhgd,bhkd->bhgk", query[:, :, -1].unflatten(1, (2, 2)), key)
    weights, seen = logits.softmax(-1).flatten(1, 2), torch.tensor([9, 9])
    step = step_sums(weights, position, seen, 0, Observation(kind="max"))
    torch.testing.assert_close(step, last, rtol=1e-5, atol=1e-6)
    with pytest.raises(OperatorError, match="without noise"):
        step_sums(weights, position, seen, 0, Observation(kind="max", noise="fresh"))


@dataclass(frozen=True, kw_only=True)
class Watches(Policy):
    """Keeps the slots that some query attended to most."""

    seen: ClassVar[list[Slots]] = []
    budget: Budget = option(0.5, "kept")
    window: int | None = option(None, "queries", low=1)

    def observe(self, step: Step) -> Observation:
        return Observation(self.window, weight=3.0, kind="max")

    def score(self, slots: Slots) -> torch.Tensor:
        self.seen.append(slots)
        return slots.observed_BHS


@pytest.mark.parametrize("window", [None, 4])
def test_a_policy_sees_the_largest_weights(window: int | None) -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(2, 24)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        full = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    Watches.seen.clear()
    with kvpress.attach(model, Watches(window=window)) as engine, torch.no_grad():
        model(ids, past_key_values=engine.new_cache())
        prompt = [slots.observed_BHS for slots in Watches.seen]
    for given, weights in zip(prompt, full, strict=True):
        wanted = weights[:, :, -(window or 24) :].amax(2).unflatten(1, (2, -1)).amax(2)
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class Adds(Watches):
    """Adds them up, and ranks by that: but for the kind, one operator call a step."""

    accumulates: ClassVar[bool] = True
    rank: ClassVar[Rank | None] = "mass"

    def observe(self, step: Step) -> Observation:
        return Observation(kind="max")


def test_a_decode_step_of_the_largest_weights_is_no_sum() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 20)
    with kvpress.attach(model, Adds(budget=64)) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        before = [layer.rows.dense("mass").sum(-1) for layer in cache.states]
        model(ids[:, :1], past_key_values=cache)
        after = [layer.rows.dense("mass").sum(-1) for layer in cache.states]
    added = torch.stack(after) - torch.stack(before)
    assert (added > 0.99).all() and added.mean() < 2.9  # a sum adds 3, the group
