"""What packed rows of few slots hold, and rows of different lengths in one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.ops import Logits
from kvpress.pipe import decode
from kvpress.policy import Budget, Observation, Policy, Room, Step, option
from kvpress.store.base import KEY, POSITION, VALUE

WIDE = 2 * 64 * 2  # bytes of a slot as it came: keys and values of 64 channels in bf16
PACKED = 2 * 64 * 4 / 8 + 4 * 64 / 64 + 4  # 4 bits, the steps of keys and those of values
POSITIONS = 4


@dataclass(frozen=True, kw_only=True)
class Uneven(Policy):
    """A row of few slots, one of half the budget, and one of what they leave."""

    accumulates = True

    budget: Budget = option(0.5, "kept")
    few: int = option(20, "slots of the first head")
    interval: int = option(1, "decoded tokens between evictions", low=0)

    def allocate(self, room: Room) -> list[list[float]]:
        few, half = min(self.few, room.slots), room.slots // 2
        return [[few, half, 3 * room.slots - few - half]]

    def observe(self, step: Step) -> Observation:
        return Observation()

    @property
    def rank(self) -> Any:
        return "mass"


def small(**fields: Any) -> Any:
    """A layer with the heads of SmolLM2, in bf16."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "hidden_size": 72}
    made = helpers.tiny(num_hidden_layers=1, max_position_embeddings=4096, **heads, **fields)
    return made.to(torch.bfloat16)


def uneven(budget: str, form: str = "quant:guard=none", few: int = 20) -> list[Policy | str]:
    return [Uneven(budget=budget, few=few), form]  # type: ignore[arg-type]


def bytes_of(slots: int, beside: int) -> int:
    """What a row in bf16 holds after a prompt. beside: bytes of a slot but for key and value."""
    short, recent = slots < 512, min(32, slots // 32)
    page = 32 if short else 64
    cost = page * 2 * 64 * 4 // 8 + 4 * 64 + 4 * page + page * beside
    pages, rest = divmod(slots - recent, page)
    if rest * (WIDE + beside) >= cost * (1 if short else 2):
        pages, rest = pages + 1, 0
    left = -(-(recent + rest) // 8) * 8  # in pages of 8
    return pages * cost + left * (WIDE + beside)


@pytest.mark.parametrize(("slots", "most"), [(40, 1.7), (130, 1.32), (200, 1.25), (1000, 1.15)])
def test_rows_of_few_slots_hold_the_bytes_of_the_formula(slots: int, most: float) -> None:
    model = small()
    with kvpress.attach(model, f"streaming_llm:budget={slots}+quant") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(helpers.prompt(1, slots + 100), past_key_values=cache)
    (state,) = cache.states
    assert state.store.counts_BH.tolist() == [[slots] * 3]
    tables = state.bytes_held - 3 * bytes_of(slots, POSITIONS)
    assert 0 < tables < 3 * 512  # channels, page tables and counters
    assert state.bytes_held <= most * 3 * slots * (PACKED + POSITIONS)


def test_a_text_of_few_tokens_holds_little_more_than_its_codes() -> None:
    model = small()
    with kvpress.attach(model, "quant") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(helpers.prompt(1, 200), past_key_values=cache)
    assert cache.states[0].bytes_held <= 1.25 * 3 * 200 * PACKED


@pytest.mark.parametrize("recipe", ["quant", "think+quant", "snapkv:budget=0.5+think+quant"])
def test_a_short_prompt_never_holds_more_than_the_full_cache(recipe: str) -> None:
    model = small()
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(helpers.prompt(1, 130), past_key_values=cache)
        for token in helpers.prompt(1, 70, seed=1).split(1, 1):
            assert cache.report().fraction < 1
            model(token, past_key_values=cache)


def test_every_row_of_a_layer_holds_the_bytes_of_its_own_length() -> None:
    model = small()
    with kvpress.attach(model, uneven("0.4prompt")) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(helpers.prompt(1, 1000), past_key_values=cache)
    (state,) = cache.states
    lengths = [20, 200, 980]
    assert state.store.counts_BH.tolist() == [lengths]
    (long, short) = state.store.aging.parts
    assert (short.layout.slots, short.layout.key_group) == (32, 32)
    assert [bool(n) for n in long.counts] == [False, False, True]
    assert [bool(n) for n in short.counts] == [True, True, False]
    tables = state.bytes_held - sum(bytes_of(slots, 2 * POSITIONS) for slots in lengths)
    assert 0 < tables < 3 * 512


FORMS = ["quant:guard=none", "quant:key_bits=8,value_bits=2,guard=0.2", "think:recent=4"]


@pytest.mark.parametrize("form", FORMS)
def test_uneven_rows_decode_evict_fork_and_are_saved(
    form: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = small(initializer_range=0.3), helpers.prompt(2, 330)
    with kvpress.attach(model, uneven("0.4", form)) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids[:, :300], past_key_values=cache)
        fork = cache.fork()
        cache.save(tmp_path / "cache")
        loaded = engine.load_cache(tmp_path / "cache")
        given = _feed(model, cache, ids[:, 300:])
        monkeypatch.setattr(decode, "_fusable", lambda *_: None)
        others = [_feed(model, other, ids[:, 300:]) for other in (fork, loaded)]
    for other, logits in zip((fork, loaded), others, strict=True):
        torch.testing.assert_close(logits, given, rtol=5e-2, atol=5e-2)
        assert helpers.positions(other, 1) == helpers.positions(cache, 1)
        assert other.check_integrity()
    _attends_to_what_it_holds(cache.states[0])


@pytest.mark.parametrize("form", FORMS)
def test_uneven_rows_of_a_padded_batch_equal_the_rows_alone(form: str) -> None:
    model, lengths = small(initializer_range=0.3), [260, 9, 75]
    ids, mask = helpers.padded(lengths, "left")
    with kvpress.attach(model, uneven("0.4prompt", form)) as engine:
        cache = engine.new_cache()
        together = helpers.greedy(model, ids, mask, 40, cache)
        for b in range(3):
            own = ids[b : b + 1][:, mask[b].bool()]
            alone = engine.new_cache()
            tokens = helpers.greedy(model, own, torch.ones_like(own), 40, alone)
            assert torch.equal(tokens, together[b : b + 1])
            assert helpers.positions(alone) == helpers.positions(cache, b)


def test_the_guard_judges_what_is_packed_of_each_row() -> None:
    """A row that is not packed at all is not moved, however long the others are."""
    model = small(initializer_range=0.3)
    for few, wide in ((5, [False, True, True]), (20, [True] * 3)):
        policies = uneven("0.4prompt", "quant:guard=0.0", few=few)
        with kvpress.attach(model, policies) as engine, torch.no_grad():
            cache = engine.new_cache()
            model(helpers.prompt(1, 300), past_key_values=cache)
        aging = cache.states[0].store.aging
        bits = [part.layout.key_bits for part in aging.parts]
        assert [bits[n] == 8 for n in aging.decided.format_R] == wide


def _feed(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Decodes these tokens one by one: the logits."""
    steps = [model(token, past_key_values=cache).logits for token in ids.split(1, 1)]
    return torch.cat(steps, 1)


def _attends_to_what_it_holds(state: Any) -> None:
    """Attention over pages of all sizes equals attention over the unpacked slots."""
    rows = state.store
    assert len({part.layout.slots for part in rows.aging.filled}) <= 2
    query = torch.randn(2, 9, 1, 64)
    out, *_ = rows.attend(query, None, Logits(0.1), False)
    logits = query.view(2, 3, 3, -1) @ rows.dense(KEY).float().mT * 0.1
    empty = rows.dense(POSITION)[:, :, None] < 0
    value = rows.dense(VALUE).float()
    wanted = (logits.masked_fill(empty, -torch.inf).softmax(-1) @ value).flatten(1, 2)
    # Unpacked slots are rounded to bf16; the operator reads the codes.
    assert float((out[:, :, 0] - wanted).abs().max()) < 2**-8 * float(value.abs().max())
