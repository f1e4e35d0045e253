"""Rows with budgets of their own: allocated, or won by scores in one layer or in all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor

import kvpress
from kvpress.errors import PolicyError
from kvpress.policy import Budget, Policy, Pool, Room, Slots, option

TOKENS = 60
SHARES = [[4.0, 1.0], [0.5, 0.5], [5.0, 1.0]]  # six rows: mean 2


@dataclass(frozen=True, kw_only=True)
class Shares(Policy):
    """Rows get these shares of the budget."""

    def allocate(self, room: Room) -> Sequence[Sequence[float]]:
        return [[room.slots * x / 2 for x in layer] for layer in SHARES]


@dataclass(frozen=True, kw_only=True)
class Ranked(Policy):
    """Scores that differ between rows, known in advance: those of a row by its values."""

    def score(self, slots: Slots) -> Tensor:
        return slots.value_BHSD.float().abs().amax(-1) * (1 + slots.layer)


@dataclass(frozen=True, kw_only=True)
class Pooled(Policy):
    scope: str = option("model", "what rows compete in")
    least: float = option(0.0, "share of their own")
    above: float = option(-1e9, "a larger score stays")

    def compete(self) -> Pool:
        above = -math.inf if self.above == -1e9 else self.above
        return Pool(self.scope, self.least, above)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Budgeted(Ranked):
    budget: Budget = option(0.25, "kept")
    sink: int = option(1, "first tokens", low=0)
    recent: int = option(2, "last tokens", low=0)
    interval: int = option(0, "decoded tokens between evictions", low=0)


def read(model: Any, policy: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    with kvpress.attach(model, policy, **options) as engine, torch.no_grad():
        cache = engine.new_cache()
        mask = torch.ones_like(ids) if mask is None else mask
        helpers.greedy(model, ids, mask, 1, cache)
    assert cache.check_integrity()
    return cache


def counts(cache: Any, sequence: int = 0) -> list[list[int]]:
    return [state.rows.counts_BH[sequence].tolist() for state in cache.states]


def test_rows_keep_what_is_allocated_to_them() -> None:
    ids = helpers.prompt(2, TOKENS)
    cache = read(helpers.tiny(), [Budgeted(), Shares()], ids)  # 15 slots a row
    assert counts(cache) == counts(cache, 1) == [[30, 8], [4, 4], [37, 7]]
    assert sum(map(sum, counts(cache))) == 6 * 15
    assert "12 rows keep 4 to 37 slots, 15 on average." in cache.report().notes


def test_what_a_row_cannot_use_goes_to_the_others() -> None:
    ids = helpers.prompt(1, 40)
    cache = read(helpers.tiny(), [Budgeted(budget=0.5), Shares()], ids)
    kept = counts(cache)
    assert kept[2][0] == 40 and kept[0][0] == 40  # 50 and 40 were allocated
    assert sum(map(sum, kept)) == 6 * 20


@pytest.mark.parametrize("budget", [0.25, 15, "30KiB"])
@pytest.mark.parametrize("other", [Shares(), Pooled(), Pooled(scope="layer", least=0.2)])
def test_the_sum_is_that_of_the_budget(other: Policy, budget: Any) -> None:
    ids = helpers.prompt(1, TOKENS)
    even = read(helpers.tiny(), Budgeted(budget=budget), ids, page_size=4)
    cache = read(helpers.tiny(), [Budgeted(budget=budget), other], ids, page_size=4)
    if budget == "30KiB":
        held = [sum(layer.bytes_held for layer in x.report().layers) for x in (cache, even)]
        assert 0.9 * held[1] < held[0] <= 30 * 1024
    else:
        assert sum(map(sum, counts(cache))) == sum(map(sum, counts(even)))
    assert counts(cache) != counts(even)
    for rows in helpers.positions(cache):
        for row in rows:
            assert {0, TOKENS - 2, TOKENS - 1} <= set(row)  # what is protected


@pytest.mark.parametrize("least", [0.0, 0.4])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_largest_scores_of_the_scope_stay(scope: str, least: float) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, TOKENS)
    whole = read(model, "full", ids)
    cache = read(model, [Budgeted(), Pooled(scope=scope, least=least)], ids)
    quota, guarded = 15, {0, TOKENS - 2, TOKENS - 1}
    rows, kept = [], helpers.positions(cache)
    for layer, state in enumerate(whole.states):
        value = state.rows.dense_by_position([0])["value"][0]
        for head in range(2):
            score = value[head].abs().amax(-1) * (1 + layer)
            rows.append(({p: float(score[p]) for p in range(TOKENS) if p not in guarded}, layer))
    scopes = [[0, 1], [2, 3], [4, 5]] if scope == "layer" else [list(range(6))]
    own = int(least * quota) - 3
    for group in scopes:
        wanted, free = {row: set(guarded) for row in group}, []
        for row in group:
            best = sorted(rows[row][0].items(), key=lambda item: -item[1])
            wanted[row] |= {p for p, _ in best[: max(0, own)]}
            free += [(-score, row, p) for p, score in best[max(0, own) :]]
        places = sum(quota - len(x) for x in wanted.values())
        for _, row, p in sorted(free)[:places]:
            wanted[row].add(p)
        for row in group:
            assert set(kept[row // 2][row % 2]) == wanted[row]


@pytest.mark.parametrize("policy", ["snapkv:window=4,pool=1", "h2o", "tova:recent=2"])
@pytest.mark.parametrize("other", [Shares(), Pooled(least=0.1), Pooled(scope="layer")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(policy: str, other: Policy, side: str) -> None:
    model, lengths, new = helpers.sharp("llama"), [41, 9, 23, 41], 8
    ids, mask = helpers.padded(lengths, side)
    with kvpress.attach(model, [policy, other]) as engine:
        cache = engine.new_cache()
        together = helpers.greedy(model, ids, mask, new, cache)
        for b in range(len(lengths)):
            own, alone = ids[b : b + 1][mask[b : b + 1].bool()][None], engine.new_cache()
            assert torch.equal(
                helpers.greedy(model, own, torch.ones_like(own), new, alone)[0], together[b]
            )
            assert helpers.positions(alone) == helpers.positions(cache, b)
        assert cache.check_integrity()


@pytest.mark.parametrize("other", [Shares(), Pooled(), Pooled(scope="layer", least=0.2)])
@pytest.mark.parametrize("budget", ["0.4", "0.08", "12", "0.4prompt"])
def test_unequal_rows_grow_in_a_batch_as_alone(budget: str, other: Policy) -> None:
    model, lengths, new = helpers.sharp("llama"), [9, 60, 33, 1], 45
    ids, mask = helpers.padded(lengths, "left")
    with kvpress.attach(model, [f"h2o:budget={budget}", other]) as engine:
        cache = engine.new_cache()
        together = helpers.greedy(model, ids, mask, new, cache)
        for b in range(len(lengths)):
            own, alone = ids[b : b + 1][mask[b : b + 1].bool()][None], engine.new_cache()
            tokens = helpers.greedy(model, own, torch.ones_like(own), new, alone)
            assert torch.equal(tokens[0], together[b])
            assert helpers.positions(alone) == helpers.positions(cache, b)


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor, pieces: Sequence[int]) -> None:
    start = int(cache.get_seq_length())
    for new in pieces:
        model(ids[:, start : start + new], past_key_values=cache, use_cache=True)
        start += new


@pytest.mark.parametrize("policy", ["h2o", "keyformer:recent=3", "knorm:recent=2"])
@pytest.mark.parametrize("other", [Shares(), Pooled(least=0.2), Pooled(scope="layer")])
def test_rows_grow_in_proportion_while_decoding(policy: str, other: Policy) -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(2, 200)
    with kvpress.attach(model, [f"{policy}{',' if ':' in policy else ':'}budget=0.4", other]) as e:
        cache = e.new_cache()
        feed(model, cache, ids, [100])
        before = torch.stack([state.rows.counts_BH for state in cache.states])
        assert before.sum().item() == 2 * 6 * 40
        feed(model, cache, ids, [1] * 100)
        after = torch.stack([state.rows.counts_BH for state in cache.states])
    assert bool(((after - 2 * before).abs() <= 2).all())
    assert 0.96 * 2 * 6 * 80 < after.sum().item() <= 2 * 6 * 80
    assert before.unique().numel() > 2
    assert cache.check_integrity()


@pytest.mark.parametrize("first", [1, 20, 50])
@pytest.mark.parametrize("budget", ["30", "0.3"])
def test_rows_trade_slots_as_a_text_grows_longer(budget: str, first: int) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 120)
    with kvpress.attach(model, [f"h2o:budget={budget},recent=2", Shares()]) as engine:
        cache = engine.new_cache()
        for seen in range(first, 121):
            feed(model, cache, ids, [first if seen == first else 1])
            rows = counts(cache)
            even = 30 if budget == "30" else 0.3 * seen
            if seen <= even:
                assert rows == [[seen] * 2] * 3
            elif seen > 30:
                total = sum(map(sum, rows))
                assert 0.85 * 6 * even - 6 < total <= 6 * even + 1e-6
                assert rows[0][0] > 2 * rows[0][1] or seen < 60
    assert cache.check_integrity()


@pytest.mark.parametrize("policy", ["h2o:budget=0.3,recent=2", "keyformer:budget=0.25,sink=2"])
@pytest.mark.parametrize("other", [Shares(), Pooled(), Pooled(scope="layer", least=0.2)])
def test_a_short_prompt_does_not_decide_what_a_long_text_keeps(policy: str, other: Policy) -> None:
    """Five tokens have more protected ones than the budget, or a budget that is rounded to one."""
    ids = helpers.prompt(1, 120)
    with kvpress.attach(helpers.tiny(), [policy, other]) as engine:
        cache = engine.new_cache()
        feed(engine.model, cache, ids, [5, *[1] * 35])
        for seen in range(40, 121):
            budget = 6 * float(engine.recipe.limits.budget.amount) * seen
            assert budget - 12 < sum(map(sum, counts(cache))) <= budget + 1e-6
            feed(engine.model, cache, ids, [1] * (seen < 120))


@pytest.mark.parametrize("other", [Shares(), Pooled(least=0.2)])
def test_forks_files_and_beams_carry_the_budgets_of_rows(other: Policy, tmp_path: Path) -> None:
    model, ids = helpers.tiny(), helpers.prompt(3, TOKENS)
    with kvpress.attach(model, ["h2o:budget=0.3", other]) as engine:
        straight, broken, turned = (engine.new_cache() for _ in range(3))
        feed(model, straight, ids, [30, *[1] * 24])
        feed(model, broken, ids, [30, *[1] * 9])
        feed(model, turned, ids, [30, *[1] * 9])
        broken.save(tmp_path / "cache.safetensors")
        loaded = engine.load_cache(tmp_path / "cache.safetensors")
        for cache in (broken.fork(), broken, loaded):
            feed(model, cache, ids, [1] * 15)
            for b in range(3):
                assert helpers.positions(cache, b) == helpers.positions(straight, b)
        order = [2, 0, 0]
        turned.reorder_cache(torch.tensor(order))
        feed(model, turned, ids[order], [1] * 15)
        for b, source in enumerate(order):
            assert helpers.positions(turned, b) == helpers.positions(straight, source)


@pytest.mark.parametrize("other", [Shares(), Pooled(), Pooled(scope="layer")])
def test_rows_are_packed_after_they_were_trimmed(other: Policy) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 400)
    plain = read(model, [Budgeted(), other], ids)
    packed = read(model, [Budgeted(), other, "quant:residual=8"], ids)
    assert helpers.positions(packed) == helpers.positions(plain)
    assert packed.report().bytes_held < 0.8 * plain.report().bytes_held


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([Budgeted(), Shares(), Pooled()], "two ways"),
        (["d2o", Shares()], "two ways"),
        (["d2o", Pooled()], "merging"),
        ([Shares()], "there is none"),
        (["full", Pooled()], "there is none"),
        ([Budgeted(), lambda: Pooled(scope="heads")], "no way to compete"),
        ([Budgeted(), lambda: Pool("layer", above=math.nan).check()], "no way to compete"),
        ([Budgeted(interval=1), Pooled(above=0.1)], "while decoding too .interval=1"),
        ([Budgeted(budget="30KiB"), Pooled(above=0.1)], "whole pages"),
    ],
)
def test_what_does_not_go_together_is_refused(policies: list[Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        kvpress.attach(helpers.tiny(), [x() if callable(x) else x for x in policies])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[15.0, 15.0]] * 2, "3 layers"),
        ([[15.0]] * 3, "2, 2, 2"),
        ([[15.0, 0.0]] * 3, "above 0"),
        ([[15.0, float("nan")]] * 3, "above 0"),
        ([[15.0, 16.0]] * 3, "allows 90"),
    ],
)
def test_wrong_allocations_are_refused(given: list[list[float]], message: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Policy):
        def allocate(self, room: Room) -> Sequence[Sequence[float]]:
            return given

    with pytest.raises(PolicyError, match=message):
        read(helpers.tiny(), [Budgeted(), Wrong()], helpers.prompt(1, TOKENS))
