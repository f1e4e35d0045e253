"""The layer contract of transformers on evicted rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import helpers
import pytest
import torch
from transformers import DynamicCache

import kvpress
from kvpress.errors import CacheError, PolicyError
from kvpress.policy import Policy, option
from kvpress.policy.budget import Budget
from kvpress.policy.slots import Slots


def after(recipe: str, ids: torch.Tensor, new: int = 1) -> tuple[object, object, object]:
    model = helpers.tiny()
    engine = kvpress.attach(model, recipe)
    cache = engine.new_cache()
    helpers.greedy(model, ids, torch.ones_like(ids), new, cache)
    return model, engine, cache


def test_logical_length_and_stored_slots_are_kept_apart() -> None:
    _, _, cache = after("h2o:budget=0.5", helpers.prompt(2, 40), new=6)
    assert cache.get_seq_length() == 45
    assert cache.get_mask_sizes(3, 0) == (48, 0)
    assert cache.get_max_length() == -1
    assert (cache.batch_size, len(cache), cache.is_compileable) == (2, 3, False)
    assert cache.report().slots_kept == [[[22] * 2] * 2] * 3


def test_kept_positions_of_rows_that_do_not_exist_are_refused() -> None:
    _, _, cache = after("h2o", helpers.prompt(2, 40))
    assert len(cache.kept_positions(0, 1, 1)) == 20
    for place in ((3, 0, 0), (0, 2, 0), (0, 0, 2), (-1, 0, 0)):
        with pytest.raises(CacheError, match=r"does not exist.* allowed are 0"):
            cache.kept_positions(*place)


@pytest.mark.parametrize("recipe", ["h2o:budget=0.5", "keyformer", "snapkv:window=4"])
def test_rows_move_with_everything_that_belongs_to_them(recipe: str) -> None:
    ids, index = helpers.prompt(3, 40), [2, 0, 0, 1]
    model, engine, cache = after(recipe, ids, new=4)
    before = [helpers.positions(cache, b) for b in range(3)]
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert [helpers.positions(cache, b) for b in range(3)] == [before[b] for b in (2, 0, 1)]
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    cache.batch_repeat_interleave(2)
    assert [helpers.positions(cache, b) for b in range(6)] == [before[b // 2] for b in range(6)]
    cache.batch_select_indices([4, 0, 1, 2])
    assert [helpers.positions(cache, b) for b in range(4)] == [before[b] for b in index]
    assert cache.check_integrity()
    step = torch.tensor([[5], [6], [6], [7]])
    mixed = model(step, past_key_values=cache).logits
    for row, source in enumerate(index):
        alone = engine.new_cache(max_new_tokens=256)
        helpers.greedy(model, ids[source : source + 1], torch.ones(1, 40).long(), 4, alone)
        own = model(step[row : row + 1], past_key_values=alone).logits
        torch.testing.assert_close(mixed[row : row + 1], own, rtol=1e-4, atol=1e-5)
        assert helpers.positions(cache, row) == helpers.positions(alone)


@pytest.mark.parametrize("recipe", ["full", "snapkv:window=4"])
def test_crop_takes_tokens_back_exactly(recipe: str) -> None:
    ids = helpers.prompt(2, 40)
    model, engine, cache = after(recipe, ids)
    again = helpers.prompt(2, 3, seed=9)
    assert cache.is_croppable
    with torch.no_grad():
        tokens = again.split(1, dim=1)  # one by one: a prompt chunk would be compressed
        expected = [model(token, past_key_values=cache).logits for token in tokens]
        cache.crop(-3)
        assert cache.get_seq_length() == 40
        given = [model(token, past_key_values=cache).logits for token in tokens]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    cache.crop(0)
    assert cache.check_integrity()
    cache.crop(-43)
    assert cache.get_seq_length() == 0
    assert engine.attached


@pytest.mark.parametrize(
    ("recipe", "tokens", "message"),
    [
        ("full", 3, "negative integer"),
        ("full", -50, "crop at most that many"),
        ("snapkv:window=4", -4, "evicted tokens at 40"),
        ("tova", -1, "evicted tokens at 43"),
        ("h2o:budget=1.0", -1, "accumulated attention"),
    ],
)
def test_a_crop_that_cannot_be_exact_is_refused(recipe: str, tokens: int, message: str) -> None:
    _, _, cache = after(recipe, helpers.prompt(1, 40), new=4)
    before = helpers.positions(cache)
    with pytest.raises(CacheError, match=message):
        cache.crop(tokens)
    assert helpers.positions(cache) == before


def test_a_crop_by_a_tensor_counts_in_integers() -> None:
    """As transformers 5.16 does after it rejected tokens."""
    ids = helpers.prompt(1, 20)
    model, _, cache = after("full", ids)
    cache.crop(torch.tensor(-2))
    assert [type(state.columns_seen) for state in cache.states] == [int] * 3
    assert model(ids[:, :1], past_key_values=cache).past_key_values.get_seq_length() == 19


def test_a_crop_behind_padding_is_refused() -> None:
    model = helpers.tiny()
    ids, mask = helpers.padded([20, 7], "right")
    with kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        helpers.greedy(model, ids, mask, 3, cache)
        cache.crop(-2)
        with pytest.raises(CacheError, match="behind the last padded column"):
            cache.crop(-1)


def test_reset_starts_over() -> None:
    model, _, cache = after("keyformer", helpers.prompt(1, 40), new=3)
    cache.reset()
    assert (cache.get_seq_length(), cache.report().bytes_held) == (0, 0)
    ids = helpers.prompt(2, 10)
    expected = helpers.greedy(model, ids, torch.ones_like(ids), 1, None)
    assert torch.equal(helpers.greedy(model, ids, torch.ones_like(ids), 1, cache), expected)


def test_padding_in_the_middle_of_a_chat_is_neither_stored_nor_attended() -> None:
    model, first = helpers.tiny(), helpers.prompt(2, 12)
    second, mask = helpers.padded([9, 4], "left", seed=7)
    whole = torch.cat([torch.ones_like(first), mask], dim=1)
    position = whole.cumsum(1) - 1
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        model(first, past_key_values=cache)
        given = model(
            second, attention_mask=whole, position_ids=position[:, 12:], past_key_values=cache
        ).logits
    for row in range(2):
        alone = torch.cat([first[row], second[row][mask[row].bool()]])[None]
        with torch.no_grad():
            expected = model(alone, past_key_values=DynamicCache(config=model.config)).logits
        torch.testing.assert_close(given[row, -1], expected[0, -1], rtol=1e-4, atol=1e-5)
        assert cache.kept_positions(0, row, 0) == list(range(alone.shape[1]))


def test_a_decode_step_may_skip_some_sequences() -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 20)
    token = torch.tensor([[5], [6]])
    with torch.no_grad(), kvpress.attach(model, "h2o:budget=0.5") as engine:
        cache, alone = engine.new_cache(), engine.new_cache()
        model(ids, past_key_values=cache)
        mask = torch.ones(2, 21)
        mask[0, 20] = 0
        model(token, attention_mask=mask, past_key_values=cache)
        model(ids[1:], past_key_values=alone)
        model(token[1:], past_key_values=alone)
        assert cache.states[0].sequences.seen_B.tolist() == [20, 21]
        assert helpers.positions(cache, 1) == helpers.positions(alone)
        untouched = engine.new_cache()
        model(ids[:1], past_key_values=untouched)
        assert helpers.positions(cache, 0) == helpers.positions(untouched)
        masses = [c.states[0].store.dense("mass")[0] for c in (cache, untouched)]
        torch.testing.assert_close(*masses, rtol=1e-5, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class Failing(Policy):
    """Fails in the last layer while it is told to."""

    budget: Budget = option(0.5, "share of the slots that is kept")
    fails: ClassVar[list[bool]] = [True]

    def score(self, slots: Slots) -> torch.Tensor:
        score = slots.position_BHS.float()
        return score * float("nan") if self.fails[0] and slots.layer == 2 else score


def test_a_pass_that_fails_in_the_last_layer_leaves_a_cache_that_is_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 40)
    with kvpress.attach(model, Failing()) as engine, torch.no_grad():
        cache = engine.new_cache()
        with pytest.raises(PolicyError, match="NaN"):
            model(ids, past_key_values=cache)
        Failing.fails[0] = False
        for use in (
            lambda: model(ids[:, :1], past_key_values=cache),
            cache.fork,
            lambda: cache.crop(-1),
        ):
            with pytest.raises(CacheError, match="interrupted"):
                use()
        cache.reset()
        model(ids, past_key_values=cache)
        assert len(cache.kept_positions(2)) == 20


def test_a_crop_into_a_prompt_chunk_is_refused_where_an_interval_began_there() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 10)
    with kvpress.attach(model, "streaming_llm:budget=30,interval=7") as engine, torch.no_grad():
        cache = engine.new_cache()
        for tokens in (ids, ids[:, :1], ids):
            model(tokens, past_key_values=cache)
        with pytest.raises(CacheError, match="end of the last prompt chunk"):
            cache.crop(-10)


def test_reordering_an_empty_cache_changes_nothing() -> None:
    with kvpress.attach(helpers.tiny(), "h2o") as engine:
        cache = engine.new_cache()
        cache.batch_select_indices(torch.tensor([0]))
        cache.reorder_cache(torch.tensor([0]))
        cache.batch_repeat_interleave(3)
        assert cache.get_seq_length() == 0
