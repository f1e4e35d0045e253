"""A fraction is of all tokens seen so far, however they came, against a plain simulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor

import kvpress
from kvpress.errors import BudgetError
from kvpress.policy import Policy, Room, option
from kvpress.policy.budget import Budget
from kvpress.policy.slots import Slots

TOKENS = 40
WAYS = {
    "whole": [30, *[1] * 10],
    "chunks": [7, 9, 2, 12, *[1] * 10],
    "singly": [1] * 40,
    "turns": [5, 1, 1, 1, 6, 1, 1, 14, *[1] * 10],
}
POLICIES = [
    "streaming_llm:sink=2",
    "h2o:recent_ratio=0.5",
    "keyformer:recent_ratio=0.3,sink=1",
    "tova:recent=3",
    "knorm:recent=2",
    "d2o:layers=uniform,sink=1,recent=2",
    "h2o:recent=2,sink=1+quant:residual=8",
]


def spec(policy: str, budget: str, interval: int = 1) -> str:
    head, _, rest = policy.partition("+")
    return f"{head},budget={budget},interval={interval}" + (f"+{rest}" if rest else "")


def simulated(pieces: list[int], limits: Any, portion: float = 1.0) -> list[int]:
    """The slots of a row after each piece of tokens; a single one after others is decoded."""
    part = limits.budget.amount * Fraction(str(round(portion, 9)))
    counts: list[int] = []
    seen = held = decoded = fixed = 0
    for new in pieces:
        prompts, seen, held = new > 1 or seen == 0, seen + new, held + new
        decoded = 0 if prompts else decoded + new
        slots = max(1, int(part * (seen if limits.budget.unit == "fraction" or prompts else fixed)))
        fixed = seen if prompts else fixed
        share = int(Fraction(str(limits.recent_ratio)) * slots)
        recent = share if limits.recent is None else limits.recent
        if prompts or (limits.interval and decoded % limits.interval == 0):
            held = min(held, max(slots, limits.sink + recent))
        counts.append(held)
    return counts


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor, pieces: list[int]) -> Iterator[int]:
    """Feeds tokens in pieces, and stops after each."""
    start = int(cache.get_seq_length())
    for new in pieces:
        model(ids[:, start : start + new], past_key_values=cache, use_cache=True)
        start += new
        yield start


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("budget", ["0.5", "0.29", "0.5prompt"])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_hold_what_the_simulation_holds(
    policy: str, budget: str, interval: int, way: str
) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, TOKENS)
    with kvpress.attach(model, spec(policy, budget, interval), page_size=4) as engine:
        limits, cache = engine.recipe.limits, engine.new_cache()
        counts = simulated(WAYS[way], limits)
        for _, count in zip(feed(model, cache, ids, WAYS[way]), counts, strict=True):
            for state in cache.states:
                assert state.rows.counts_BH.tolist() == [[count] * 2] * 2
            assert cache.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_way_in_which_tokens_came_does_not_show(policy: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, TOKENS)
    counts, kept = [], []
    with kvpress.attach(model, spec(policy, "0.4")) as engine:
        for pieces in WAYS.values():
            cache = engine.new_cache()
            list(feed(model, cache, ids, pieces))
            counts.append([state.rows.counts_BH.tolist() for state in cache.states])
            kept.append(helpers.positions(cache))
    assert all(other == counts[0] for other in counts)
    if policy.startswith("streaming_llm"):  # its ranks do not depend on what attended when
        assert all(other == kept[0] for other in kept)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("policy", ["h2o:sink=1", "tova:recent=2", "d2o:layers=variance,sink=1"])
def test_rows_of_several_lengths_grow_each_by_its_own_tokens(policy: str, side: str) -> None:
    model, lengths, new = helpers.tiny(), [25, 4, 12, 25], 15
    ids, mask = helpers.padded(lengths, side)
    with kvpress.attach(model, spec(policy, "0.3")) as engine:
        cache = engine.new_cache()
        together = helpers.greedy(model, ids, mask, new, cache)
        for b in range(len(lengths)):
            own = ids[b : b + 1][mask[b : b + 1].bool()][None]
            alone = engine.new_cache()
            tokens = helpers.greedy(model, own, torch.ones_like(own), new, alone)
            assert torch.equal(tokens[0], together[b])
            assert helpers.positions(alone) == helpers.positions(cache, b)


def test_layers_that_are_alike_share_the_quotas_of_a_step() -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, TOKENS)
    with kvpress.attach(model, "h2o:budget=0.5") as engine:
        cache = engine.new_cache()
        for seen in feed(model, cache, ids, [10, *[1] * 12]):
            if seen > 12:
                for name in ("quota_R", "recent_R"):
                    made = [getattr(state.sequences, name) for state in cache.states]
                    assert len({x.untyped_storage().data_ptr() for x in made}) == 1
    assert cache.states[0].sequences.recent_R.tolist() == [5] * 4


@pytest.mark.parametrize("policy", ["h2o:budget=0.3", "d2o:budget=0.3,sink=1", "tova:budget=0.3"])
def test_a_fork_a_file_and_a_reordered_batch_grow_on(policy: str, tmp_path: Path) -> None:
    model, ids = helpers.tiny(), helpers.prompt(3, TOKENS)
    with kvpress.attach(model, policy) as engine, torch.no_grad():
        straight, broken = engine.new_cache(), engine.new_cache()
        list(feed(model, straight, ids, [12, *[1] * 20]))
        list(feed(model, broken, ids, [12, *[1] * 7]))
        forked = broken.fork()
        broken.save(tmp_path / "cache.safetensors")
        loaded = engine.load_cache(tmp_path / "cache.safetensors")
        for cache in (forked, broken, loaded):
            list(feed(model, cache, ids, [1] * 13))
            for b in range(3):
                assert helpers.positions(cache, b) == helpers.positions(straight, b)
        order = [2, 0, 0]
        turned = engine.new_cache()
        list(feed(model, turned, ids, [12, *[1] * 7]))
        turned.reorder_cache(torch.tensor(order))
        list(feed(model, turned, ids[order], [1] * 13))
        for b, source in enumerate(order):
            assert helpers.positions(turned, b) == helpers.positions(straight, source)


@pytest.mark.parametrize("policy", ["streaming_llm:budget=0.4,sink=2", "h2o:budget=0.4"])
def test_drafted_tokens_count_when_they_stay(policy: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, TOKENS)
    with kvpress.attach(model, policy) as engine, torch.no_grad():
        limits, cache = engine.recipe.limits, engine.new_cache()
        list(feed(model, cache, ids, [20, 1, 1]))
        cache.activate_past_recording()
        for drafted, rejected in ((5, 2), (4, 0), (3, 3), (6, 1)):
            list(feed(model, cache, ids, [drafted]))
            if rejected:
                cache.crop(-rejected)
        cache.stop_past_recording()
        seen = 22 + 3 + 4 + 0 + 5
        (*_, count) = simulated([20, *[1] * (seen - 20)], limits)
        assert cache.states[0].sequences.seen_B.tolist() == [seen] * 2
        assert all(s.rows.counts_BH.tolist() == [[count] * 2] * 2 for s in cache.states)
        if policy.startswith("streaming"):
            last = [*range(2), *range(seen - count + 2, seen)]
            assert helpers.positions(cache)[0][0] == last
        list(feed(model, cache, ids, [1] * 4))
        (*_, count) = simulated([20, *[1] * (seen - 16)], limits)
        assert all(s.rows.counts_BH.tolist() == [[count] * 2] * 2 for s in cache.states)


def test_cropped_tokens_take_their_share_with_them() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, TOKENS)
    with kvpress.attach(model, "knorm:budget=0.9,recent=9") as engine, torch.no_grad():
        cache = engine.new_cache()
        list(feed(model, cache, ids, [9, 1]))  # 9 of 10: evicted
        list(feed(model, cache, ids, [1] * 4))
        with pytest.raises(kvpress.errors.CacheError):
            cache.crop(-5)
        straight = engine.new_cache()
        list(feed(model, straight, ids, [9, *[1] * 11]))
        evicted = cache.states[0].evicted_at
        cache.crop(evicted - cache.get_seq_length())
        list(feed(model, cache, ids, [1] * (20 - evicted)))
        assert helpers.positions(cache) == helpers.positions(straight)


@dataclass(frozen=True, kw_only=True)
class Uneven(Policy):
    """The second head keeps what the first one leaves of twice the budget."""

    budget: Budget = option(0.5, "kept")
    recent: int = option(2, "last tokens", low=0)
    interval: int = option(1, "decoded tokens between evictions", low=0)

    def allocate(self, room: Room) -> list[list[float]]:
        less = [room.slots / (2 + layer) for layer in range(3)]
        return [[n, 2 * room.slots - n] for n in less]

    def score(self, slots: Slots) -> Tensor:
        return slots.position_BHS.float()


@pytest.mark.parametrize("way", WAYS)
def test_heads_keep_what_the_policy_allocates_and_grow_in_proportion(way: str) -> None:
    model, ids, policy = helpers.tiny(), helpers.prompt(2, TOKENS), Uneven(budget=0.4)  # type: ignore[arg-type]
    with kvpress.attach(model, policy) as engine:
        cache = engine.new_cache()
        for new, seen in zip(WAYS[way], feed(model, cache, ids, WAYS[way]), strict=True):
            held = [state.rows.counts_BH.tolist() for state in cache.states]
            assert all(rows[0] == rows[1] for rows in held)
            if new > 1:  # a prompt: the sum is exact
                assert sum(sum(rows[0]) for rows in held) == 6 * max(2, int(Fraction("0.4") * seen))
            elif seen > 30:
                for layer, rows in enumerate(held):
                    wanted = 0.4 * seen / (2 + layer)
                    assert abs(rows[0][0] - max(2, wanted)) < 2
                    assert abs(rows[0][1] - min(seen, 0.8 * seen - wanted)) < 3


@dataclass(frozen=True, kw_only=True)
class Pyramid(Uneven):
    """The first layer gets half as much again, and the last one what is left."""

    def allocate(self, room: Room) -> list[list[float]]:
        return [[room.slots * part] * 2 for part in (1.5, 1.0, 0.5)]


def test_layers_may_take_from_each_other_and_no_more_than_that() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, TOKENS)
    with kvpress.attach(model, Pyramid(budget=0.4)) as engine:  # type: ignore[arg-type]
        cache = engine.new_cache()
        list(feed(model, cache, ids, [30, *[1] * 9]))  # 15 slots a row
        assert [layer[0] for layer in cache.report().slots_kept] == [[23] * 2, [15] * 2, [7] * 2]


def test_layers_with_budgets_of_their_own_meet_the_mean_while_decoding() -> None:
    model, ids = helpers.tiny(num_hidden_layers=6), helpers.prompt(2, 400)
    for pieces in ([100, *[1] * 100], [30, *[1] * 170], [50, 50, *[1] * 100]):
        with kvpress.attach(model, "d2o:budget=0.3,sink=1") as engine:
            cache = engine.new_cache()
            list(feed(model, cache, ids, pieces))
        counts = torch.stack([state.rows.counts_BH for state in cache.states])
        assert (counts.double().mean(0) <= 60).all()
        assert (counts.double().mean(0) > 59).all()  # each layer is rounded down
        assert counts.unique().numel() > 1


def test_layers_that_are_kept_whole_stay_whole_and_the_mean_holds() -> None:
    model, ids = helpers.tiny(num_hidden_layers=6), helpers.prompt(2, 60)
    with kvpress.attach(model, "d2o:budget=0.7,mode=official_code,sink=1") as engine:
        cache = engine.new_cache()
        list(feed(model, cache, ids, [30, *[1] * 30]))
    counts = torch.stack([state.rows.counts_BH for state in cache.states]).double()
    assert (counts[[0, 1, 5]] == 60).all()
    assert ((counts.mean(0) > 0.7 * 60 - 1) & (counts.mean(0) <= 0.7 * 60)).all()


def test_protected_tokens_and_less_than_one_are_said() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, TOKENS)
    with kvpress.attach(model, "h2o:budget=0.5,recent=9") as engine:
        cache = engine.new_cache()
        list(feed(model, cache, ids, [12]))
        assert any("protected tokens (sink 0, recent 9)" in n for n in cache.report().notes)
    with kvpress.attach(model, "h2o:budget=0.1,recent=0") as engine:
        cache = engine.new_cache()
        list(feed(model, cache, ids, [5]))
        assert any("less than one: 1 was kept" in n for n in cache.report().notes)
    with kvpress.attach(model, "h2o:budget=0.5prompt") as engine:
        cache = engine.new_cache()
        list(feed(model, cache, ids, [6, 6]))
        (line,) = [n for n in cache.report().notes if "rows stay at" in n]
        assert line == "While decoding, rows stay at 6 slots: 0.5prompt of a prompt of 12 tokens."


def test_the_unit_of_a_prompt_is_read_and_written() -> None:
    for text in ("0.5prompt", "0.29 Prompt", "1prompt", "1e-1prompt"):
        budget = Budget.parse(text)
        assert (budget.unit, budget.grows, budget.relative) == ("prompt", False, True)
        assert Budget.parse(str(budget)) == budget
    assert Budget.parse("0.5").grows and not Budget.parse("1.0").grows
    for text in ("2prompt", "0prompt", "0.5prompts"):
        with pytest.raises(BudgetError, match=r"0\.5prompt"):
            Budget.parse(text)
