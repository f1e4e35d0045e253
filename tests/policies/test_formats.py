"""Old slots with fewer channels (`think`) and fewer bits (`quant`)."""

from __future__ import annotations

import itertools
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress import ops
from kvpress.errors import CacheError, PolicyError
from kvpress.formulas.attention import prompt_attention
from kvpress.ops import Logits
from kvpress.pipe import decode
from kvpress.pipe.stages import format
from kvpress.policy import formats
from kvpress.policy.formats import Window
from kvpress.policy.loading import load_policy, parse
from kvpress.store import packing
from kvpress.store.aging import PageAging
from kvpress.store.base import KEY, POSITION, VALUE

PRUNED = "think:keep=0.6,recent=8,window=8"
PACKED = "quant:key_bits=4,value_bits=4,residual=8,guard=none"
EVICTING = "keyformer:budget=0.5,noise=frozen"
RECIPES = [
    PRUNED,
    PACKED,
    f"{PRUNED}+{PACKED}",
    f"h2o:budget=0.6+{PACKED}",
    f"{EVICTING}+{PRUNED}+{PACKED}",
    f"tova:budget=0.6+{PRUNED}",
    "quant:key_bits=8,value_bits=2,residual=8,guard=0.2",
]


def window(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None) -> Window:
    """A window over keys that stand in order."""
    slots = key.shape[2]
    return Window(
        layer=0,
        query_BNQD=query,
        key_BHSD=key,
        value_BHSE=key if value is None else value,
        position_BHS=torch.arange(slots).expand(*key.shape[:2], slots),
        seen_B=torch.full((len(key),), slots),
        scaling=key.shape[3] ** -0.5,
        softcap=0.0,
    )


def run(
    model: Any, recipe: str, ids: torch.Tensor, new: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, Any]:
    """Greedy tokens and the cache."""
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache(max_new_tokens=new)
        mask = torch.ones_like(ids) if mask is None else mask
        return helpers.greedy(model, ids, mask, new, cache), cache


# ThinK: the worked example and the properties of its specification

QUERY = torch.tensor([[1.0, 0, 2, -1], [2, 1, 0, 1]])[None, None]
KEYS = torch.tensor([[2.0, 1, 0, 1], [0, 3, 1, -1], [1, 0, 1, 2]])[None, None]


def test_think_scores_and_channels_of_the_worked_example() -> None:
    held = torch.ones(1, 1, 3, dtype=torch.bool)
    score = ops.channel_scores(QUERY, KEYS, held)[0, 0]
    torch.testing.assert_close(score, torch.tensor([25.0, 10, 8, 12]) / 6)
    norms = torch.tensor([5.0, 3.1623, 2.8284, 3.4641])
    torch.testing.assert_close((score * 6).sqrt(), norms, rtol=1e-4, atol=1e-5)
    for method, kept in (("greedy", [0, 3]), ("forward_selection", [0, 1])):
        chosen = load_policy("think", keep=0.5, method=method).prune(window(QUERY, KEYS))
        assert chosen.key_BHC.tolist() == [[kept]]
        assert chosen.value_BHU is None
    lost = KEYS.clone()
    lost[..., [0, 3]] = 0
    residual = (QUERY @ lost.mT).square().sum()
    assert residual == 18.0


def test_think_decode_of_the_worked_example() -> None:
    query = torch.tensor([1.0, -1, 0.5, 2])
    recent = torch.tensor([[1.0, 0, 1, 0], [0.5, 0.5, -1, 1]])
    keys = KEYS[0, 0].clone()
    keys[:, [1, 2]] = 0
    logits = torch.cat([keys, recent]) @ query / 2  # √D, not √T
    torch.testing.assert_close(logits, torch.tensor([2.0, -1.0, 2.5, 0.75, 0.75]))
    weights = torch.tensor([0.305669, 0.015218, 0.503962, 0.087575, 0.087575])
    torch.testing.assert_close(logits.softmax(0), weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3])
def test_think_score_is_the_norm_of_the_outer_product(group: int) -> None:
    query, key = torch.randn(2, 2 * group, 5, 16), torch.randn(2, 2, 9, 16)
    held = torch.rand(2, 2, 9) < 0.7
    held[..., 0] = True
    score = ops.channel_scores(query, key, held)
    for b, h, j in itertools.product(range(2), range(2), range(16)):
        own = query[b, h * group : (h + 1) * group, :, j]
        outer = own.reshape(-1, 1) * key[b, h, held[b, h], j]
        expected = outer.square().sum() / (own.numel() * held[b, h].sum())
        torch.testing.assert_close(score[b, h, j], expected, rtol=1e-5, atol=1e-7)


def test_think_keeps_as_many_channels_as_the_code() -> None:
    for width, keep, kept in [(64, 0.6, 39), (128, 0.6, 77), (128, 0.7, 90), (128, 0.4, 52)]:
        chosen = load_policy("think", keep=keep).prune(
            window(torch.randn(1, 2, 8, width), torch.randn(1, 1, 20, width))
        )
        assert chosen.key_BHC.shape == (1, 1, kept)
    whole = load_policy("think", keep=1.0).prune(window(QUERY, KEYS))
    assert whole.key_BHC is None


@pytest.mark.parametrize("method", ["greedy", "forward_selection"])
def test_think_residual_is_the_sum_of_the_gram_matrix(method: str) -> None:
    query, key = torch.randn(1, 1, 6, 10).double(), torch.randn(1, 1, 30, 10).double()
    chosen = load_policy("think", keep=0.6, method=method).prune(window(query.float(), key.float()))
    lost = [j for j in range(10) if j not in chosen.key_BHC[0, 0].tolist()]
    q, k = query[0, 0], key[0, 0]
    gram = (q.T @ q) * (k.T @ k)
    residual = (q[:, lost] @ k[:, lost].T).square().sum()
    torch.testing.assert_close(residual, gram[lost][:, lost].sum())
    assert residual.sqrt() <= gram.diagonal().sqrt()[lost].sum() + 1e-9


def test_think_forward_selection_drops_what_changes_the_logits_least_step_by_step() -> None:
    """Against the norm itself, of all channels dropped so far and each one more."""
    prune = load_policy("think", keep=0.5, method="forward_selection").prune
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        q, k = (torch.randn(n, 12, generator=generator) + 0.5 for n in (6, 30))
        lost: list[int] = []
        for _ in range(6):
            rest = [j for j in range(12) if j not in lost]
            change = [(q[:, [*lost, j]] @ k[:, [*lost, j]].T).norm() for j in rest]
            lost.append(rest[int(torch.stack(change).argmin())])
        kept = prune(window(q[None, None], k[None, None])).key_BHC[0, 0].tolist()
        assert kept == [j for j in range(12) if j not in lost]


def test_think_masks_do_not_change_with_order_scale_sign_or_copies() -> None:
    prune = load_policy("think", keep=0.5).prune
    query, key = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 40, 16)
    wanted = prune(window(query, key)).key_BHC
    sign = torch.ones(16)
    sign[3] = -1
    stretch = torch.rand(16) + 0.5
    for q, k in [
        (query, key[:, :, torch.randperm(40)]),
        (query * 7, key * 0.1),
        (query * sign, key * sign),
        (query * stretch, key / stretch),
        (query.repeat_interleave(3, 1), key),
    ]:
        assert torch.equal(prune(window(q, k)).key_BHC, wanted)


def test_think_greedy_is_best_where_the_queries_channels_are_orthogonal() -> None:
    query = torch.linalg.qr(torch.randn(12, 8))[0][None, None]
    key = torch.randn(1, 1, 30, 8)
    kept = load_policy("think", keep=0.5).prune(window(query, key)).key_BHC[0, 0].tolist()
    q, k = query[0, 0], key[0, 0]
    gram = (q.T @ q) * (k.T @ k)

    def residual(lost: tuple[int, ...]) -> float:
        return float(gram[list(lost)][:, list(lost)].sum())

    own = tuple(j for j in range(8) if j not in kept)
    least = min(residual(lost) for lost in itertools.combinations(range(8), 4))
    assert residual(own) == pytest.approx(least, rel=1e-4)


def test_think_ranks_tiny_half_precision_channels() -> None:
    energy = torch.linspace(1, 2, 16)[torch.randperm(16)]
    query = (1e-3 * energy * torch.ones(1, 1, 8, 16)).half()
    key = (1e-3 * torch.ones(1, 1, 20, 16)).half()
    assert (query**2).mean(2).max() * (key**2).mean(2).max() == 0  # what half precision makes of it
    kept = load_policy("think", keep=0.5).prune(window(query, key)).key_BHC[0, 0]
    assert kept.tolist() == sorted(energy.argsort(descending=True)[:8].tolist())


def test_think_value_scores_are_norms_of_the_outputs() -> None:
    query, key, value = (
        torch.randn(1, 4, 6, 16),
        torch.randn(1, 2, 30, 16),
        torch.randn(1, 2, 30, 8),
    )
    chosen = load_policy("think", keep=1.0, value_keep=0.5).prune(window(query, key, value))
    out = prompt_attention(query, key, value, None, 0.25)
    score = out.view(1, 2, 2, 6, 8).square().sum((2, 3))
    wanted = score.argsort(dim=-1, descending=True)[..., :4].sort(-1).values
    assert torch.equal(chosen.value_BHU, wanted)


def test_think_prunes_pairs_that_turn_together() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 80)
    with kvpress.attach(model, "think:keep=0.6,recent=4,pairs=true") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
    width = cache.states[0].key_width
    for row in cache.states[0].store.aging.decided.key_channels_RC.tolist():
        assert {(j + width // 2) % width for j in row} == set(row)
        assert len(row) == width - int(width * 0.4) // 2 * 2


# The store


@pytest.mark.parametrize("recipe", RECIPES)
def test_attention_equals_attention_over_the_unpacked_slots(recipe: str) -> None:
    model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(2, 200)
    _, cache = run(model, recipe, ids, 90)
    for state in cache.states:
        rows = state.store
        assert rows.aging is not None and rows.aging.parts
        query = torch.randn(2, 4, 1, state.key_width)
        position = rows.dense(POSITION).long()
        out, _, weights = rows.attend(query, None, Logits(0.3), True)
        logits = query.view(2, 2, 2, -1) @ rows.dense(KEY).float().mT * 0.3
        exact = logits.masked_fill(position[:, :, None] < 0, -torch.inf).softmax(-1)
        # Products with codes are of 16 bits, relative to the largest factor (decode_rows/README).
        given = weights[:, :, 0, : position.shape[2]]
        assert float((given - exact.flatten(1, 2)).abs().max()) < 2**-12
        value = rows.dense(VALUE).float()
        wanted = (exact @ value).flatten(1, 2)
        assert float((out[:, :, 0] - wanted).abs().max()) < 2**-12 * float(value.abs().max())
        part, *_ = rows.attend(query[1:], [1], Logits(0.3), False)
        torch.testing.assert_close(part, out[1:])
    assert cache.check_integrity()


def test_recent_slots_are_as_they_came_and_new_ones_stay_whole() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 150)
    _, full = run(model, "full", ids, 2)
    _, cache = run(model, f"{PRUNED}+{PACKED}", ids, 2)
    first, other = full.states[0], cache.states[0]
    columns = other.store.aging.recent.dense_by_position([0])
    position = columns[POSITION][0, 0].long()
    assert len(position) >= 8
    for name in (KEY, VALUE):
        exact = first.store.dense_by_position([0])[name][:, :, position]
        assert torch.equal(columns[name], exact)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "budget" in r])
def test_one_call_per_step_equals_the_stages(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(2, 150)
    together, one = run(model, recipe, ids, 180)
    monkeypatch.setattr(decode, "_fusable", lambda *_: None)
    apart, two = run(model, recipe, ids, 180)
    assert torch.equal(together, apart)
    assert helpers.positions(one, 1) == helpers.positions(two, 1)
    for a, b in zip(one.states, two.states, strict=True):
        if a.recipe.accumulates:
            masses = [s.store.dense_by_position([0, 1])["mass"] for s in (a, b)]
            held = []
            for mass, state in zip(masses, (a, b), strict=True):
                held.append(mass[state.store.dense_by_position([0, 1])[POSITION] >= 0])
            torch.testing.assert_close(*held, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        ("streaming_llm:budget=0.5prompt", 200),
        ("h2o:budget=0.5prompt,recent=4", 200),
        ("h2o:budget=0.5,recent=4", 349),
    ],
)
def test_evicted_old_slots_leave_holes_that_are_packed_again(recipe: str, kept: int) -> None:
    model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(2, 400)
    _, cache = run(model, f"{recipe}+{PACKED}", ids, 300)
    for state in cache.states:
        (part,) = state.store.aging.filled
        slot_S = torch.arange(int(part.counts.max()))
        holes = (part.dense(POSITION) < 0) & (slot_S < part.counts.view(2, 2, 1))
        assert torch.equal(holes.sum(-1).flatten(), part.dropped)
        # A page more than the limit may come together until the next tokens become old.
        page = part.layout.slots
        assert int(part.dropped.max()) <= max(page, int(part.counts.max()) // 8) + page
        assert state.store.counts_BH.tolist() == [[kept, kept]] * 2
    assert cache.check_integrity()


@pytest.mark.parametrize("recipe", RECIPES)
def test_forks_go_on_as_if_they_were_alone(recipe: str) -> None:
    model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(2, 150)
    more = helpers.prompt(2, 100, seed=5)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache(max_new_tokens=200)
        model(ids, past_key_values=cache)
        fork = cache.fork()
        for step in range(100):
            model(more[:, step : step + 1], past_key_values=cache)
        assert cache.check_integrity() and fork.check_integrity()
        for step in range(100):
            given = model(more[:, step : step + 1], past_key_values=fork).logits
        alone = engine.new_cache(max_new_tokens=200)
        model(ids, past_key_values=alone)
        for step in range(100):
            wanted = model(more[:, step : step + 1], past_key_values=alone).logits
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
    assert fork.check_integrity() and cache.check_integrity()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_saved_cache_goes_on_as_it_would_have(recipe: str, tmp_path: Any) -> None:
    model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(2, 150)
    more = helpers.prompt(2, 80, seed=5)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        for tokens in (20, 150):  # before and after slots were packed
            cache = engine.new_cache(max_new_tokens=80)
            model(ids[:, :tokens], past_key_values=cache)
            cache.save(tmp_path / "cache.safetensors")
            loaded = engine.load_cache(tmp_path / "cache.safetensors")
            assert loaded.check_integrity()
            for step in range(80):
                token = more[:, step : step + 1]
                a = model(token, past_key_values=cache).logits
                b = model(token, past_key_values=loaded).logits
                assert torch.equal(a, b)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_of_a_padded_batch_equal_the_rows_alone(recipe: str) -> None:
    model = helpers.tiny(initializer_range=0.3)
    lengths = [140, 5, 90]
    ids, mask = helpers.padded(lengths, "left")
    together, cache = run(model, recipe, ids, 90, mask)
    assert cache.check_integrity()
    for row in range(3):
        alone = ids[row : row + 1][:, mask[row].bool()]
        expected, own = run(model, recipe, alone, 90)
        assert torch.equal(together[row : row + 1], expected), row
        assert helpers.positions(cache, row) == helpers.positions(own), row


@pytest.mark.parametrize("recipe", [PRUNED, PACKED])
def test_cropping_forgets_the_last_tokens_of_both_parts(recipe: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 200)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        before = {n: x.clone() for n, x in cache.states[0].store.dense_by_position([0, 1]).items()}
        for tokens in (3, 60, 60):
            cache.crop(-tokens)
            assert cache.check_integrity()
        rows = cache.states[0].store
        after = rows.dense_by_position([0, 1])
        assert rows.counts_BH.tolist() == [[77, 77]] * 2
        held = after[POSITION][0, 0] >= 0
        for name in (KEY, VALUE):
            assert torch.equal(after[name][:, :, held], before[name][:, :, -200:][:, :, :77])
        model(ids[:, :40], past_key_values=cache)
        assert cache.states[0].store.counts_BH.tolist() == [[117, 117]] * 2
        assert cache.check_integrity()


@pytest.mark.parametrize("recipe", RECIPES)
def test_beams_and_equal_prompts(recipe: str) -> None:
    model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(1, 150)
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache(max_new_tokens=70)
        out = engine.generate(ids, cache=cache, num_beams=3, max_new_tokens=70, do_sample=False)
        assert out.shape[1] > 150
        assert cache.check_integrity()


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_prompt_shorter_than_the_residual_works(recipe: str, tokens: int) -> None:
    model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(2, tokens)
    out, cache = run(model, recipe, ids, 150)
    assert out.shape == (2, 150)
    assert cache.check_integrity()
    if "budget" not in recipe:
        aging = cache.states[0].store.aging
        assert aging.parts and bool(aging.decided_B.all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_chunks_and_turns_keep_the_channels(recipe: str) -> None:
    model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(2, 260)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache(max_new_tokens=20)
        model(ids[:, :130], past_key_values=cache)
        chosen = cache.states[0].store.aging.decided.key_channels_RC.clone()
        model(ids[:, 130:], past_key_values=cache)
        for step in range(5):
            model(ids[:, step : step + 1], past_key_values=cache)
    assert cache.check_integrity()
    if len(chosen):
        assert torch.equal(cache.states[0].store.aging.decided.key_channels_RC, chosen)
    if "budget" not in recipe:
        assert helpers.positions(cache)[0][0] == list(range(265))


@pytest.mark.parametrize("tokens", [40, 100])  # before and after channels are chosen
@pytest.mark.parametrize("recipe", [PRUNED, PACKED])
def test_speculative_decoding_gives_the_same_tokens(recipe: str, tokens: int) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, tokens)
    with kvpress.attach(model, recipe) as engine:
        rest = {"max_new_tokens": 60, "do_sample": False}
        plain = engine.generate(ids, cache=engine.new_cache(), **rest)
        cache = engine.new_cache()
        drafted = engine.generate(ids, cache=cache, prompt_lookup_num_tokens=3, **rest)
    assert torch.equal(plain, drafted)
    assert cache.check_integrity()


# Quantisation


def test_the_guard_keeps_rows_wide_that_do_not_stand_few_bits() -> None:
    model, ids = helpers.tiny(initializer_range=0.3), helpers.prompt(2, 150)
    for bound, wide in ((0.0, True), (1e9, False)):
        recipe = f"quant:key_bits=2,value_bits=2,residual=8,guard={bound}"
        with kvpress.attach(model, recipe) as engine, torch.no_grad():
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            rows = cache.states[0].store
            assert rows.aging.decided.format_R.tolist() == [wide] * 4
            narrow, eight = rows.aging.parts
            assert (int(narrow.counts.sum()) == 0) == wide
            assert (int(eight.counts.sum()) > 0) == wide
            notes = " ".join(engine.report(cache).notes)
            assert ("8 bits" in notes) == wide


@pytest.mark.parametrize("group", [32, 96, 160, 256])
def test_groups_of_any_allowed_size_work(group: int) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 400)
    recipe = f"quant:key_bits=8,value_bits=8,residual=8,guard=none,group={group}"
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    (part,) = cache.states[0].store.aging.parts
    assert part.layout.key_group == group and int(part.counts.min()) > 0


@pytest.mark.parametrize("recipe", [PRUNED, "quant:residual=8,guard=0.0"])
def test_taken_back_tokens_leave_something_to_choose_channels_by(recipe: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 60)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        cache.crop(-50)
        assert all(x.shape[1] == 0 for x in cache.states[0].sequences.watched.values())
        model(ids, past_key_values=cache)
        model(helpers.prompt(1, 20, seed=3), past_key_values=cache)
    assert cache.states[0].store.aging.parts and cache.check_integrity()


@pytest.mark.parametrize(
    "recipe", [PRUNED, "quant:residual=8,guard=0.0", f"h2o:budget=45+{PRUNED}"]
)
@pytest.mark.parametrize("prompt", [1, 20, 33, 36, 90])
def test_queries_that_later_ones_replace_are_not_held(
    recipe: str, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short texts hold none, and what decides in the end is the same."""
    model, ids = helpers.tiny(), helpers.prompt(2, 200)
    windows: list[torch.Tensor] = []
    made = format._window

    def window_of(*args: Any) -> Window:
        window = made(*args)
        windows.append(window.query_BNQD.clone())
        return window

    monkeypatch.setattr(format, "_window", window_of)

    def tell() -> list[torch.Tensor]:
        windows.clear()
        with kvpress.attach(model, recipe) as engine, torch.no_grad():
            cache = engine.new_cache()
            most = max(engine.recipe.watched, 8)
            model(ids[:, :prompt], past_key_values=cache)
            for token in range(prompt, 150):
                held = [state.sequences.watched.get(0) for state in cache.states]
                assert all(x is None or x.shape[1] <= most for x in held)
                few = token < 40 - 8 and PageAging.before_old is honest
                assert not few or all(x is None for x in held)
                model(ids[:, token : token + 1], past_key_values=cache)
            assert all(state.sequences.watched == {} for state in cache.states)
        return list(windows)

    honest = PageAging.before_old
    given = tell()
    monkeypatch.setattr(PageAging, "before_old", lambda self, sequence: 0)
    wanted = tell()
    assert given
    assert all(map(torch.equal, given, wanted))


def test_rejected_drafts_leave_what_is_watched() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 36)
    with kvpress.attach(model, PRUNED) as engine, torch.no_grad():
        cache = engine.new_cache()
        for part in ids.split(30, 1):  # a longer one is packed at once
            model(part, past_key_values=cache)
        before = cache.states[0].sequences.watched[0].clone()
        cache.activate_past_recording()
        model(ids[:, :5], past_key_values=cache)
        cache.crop(-5)
    assert torch.equal(cache.states[0].sequences.watched[0], before)


def test_numbers_beyond_the_range_of_steps_are_refused() -> None:
    layout = formats.layouts(formats.Packing(4, 4), (16, 16), (16, 16), 4, False)[0]
    channels = (torch.arange(16).short()[None],) * 2
    x = torch.randn(1, 64, 16)
    packing.pack(layout, x, x, channels)
    for bad in (1e5, torch.nan, torch.inf):
        y = x.clone()
        y[0, 3, 2] = bad
        with pytest.raises(CacheError, match="Keep values at 16 bits"):
            packing.pack(layout, x, y, channels)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (f"d2o:budget=0.5+{PACKED}", "never written again"),
        (f"h2o:budget=1MiB+{PACKED}", "budget in bytes"),
        ("quant:key_bits=3", "allowed are 16, 8, 4, 2"),
        ("quant:group=48", "group=48"),
        ("think:pairs=true,method=forward_selection", "pairs=true"),
        (f"{PACKED}+quant:key_bits=8", "both replace"),
    ],
)
def test_what_cannot_work_is_refused(recipe: str, reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        parse(recipe)


def test_keys_that_carry_positions_are_refused() -> None:
    with pytest.raises(PolicyError, match="ALiBi"):
        kvpress.attach(helpers.tiny("bloom"), PACKED)


# Bytes


@pytest.mark.parametrize(("keep", "kept"), [(0.7, 90), (0.6, 77), (0.5, 64), (0.4, 52)])
@pytest.mark.parametrize("slots", [128, 512, 2048])
def test_think_holds_the_bytes_of_the_formula(keep: float, kept: int, slots: int) -> None:
    model = helpers.tiny(head_dim=128, num_hidden_layers=1, max_position_embeddings=4096)
    model = model.to(torch.bfloat16)
    with kvpress.attach(model, f"think:keep={keep}") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(helpers.prompt(1, slots), past_key_values=cache)
    rows, heads = cache.states[0].store, 2
    (part,) = rows.aging.parts
    pages = part.paging.pages("page").nbytes // heads
    recent = rows.aging.recent.counts.sum().item() // heads * 2 * 128 * 2
    mask = 128 // 8
    fraction = (pages + recent + mask) / (slots * 2 * 128 * 2)
    formula = ((slots - 32) * kept + 32 * 128 + slots * 128) / (2 * slots * 128)
    assert fraction == pytest.approx(formula, abs=5e-4)
    assert cache.report().bytes_held == pytest.approx(
        heads * (pages + recent), rel=0.2 if slots < 2048 else 0.03
    )


@pytest.mark.parametrize(
    ("recipe", "most"),
    [
        ("think:keep=0.6", 0.81),
        ("quant:key_bits=8,value_bits=8", 0.53),
        ("quant:key_bits=4,value_bits=4", 0.31),
        ("keyformer:budget=0.5+think:keep=0.6+quant:key_bits=4,value_bits=4", 0.16),
    ],
)
def test_bytes_at_8000_tokens(recipe: str, most: float) -> None:
    model = helpers.tiny(
        head_dim=64, num_hidden_layers=1, num_key_value_heads=1, max_position_embeddings=9000
    ).to(torch.bfloat16)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache(max_new_tokens=2)
        model(helpers.prompt(1, 8000), past_key_values=cache)
        model(helpers.prompt(1, 1), past_key_values=cache)
        report = engine.report(cache)
    assert report.fraction <= most
    assert report.bytes_held >= helpers.live_storages(cache.states[0].store) * 0.99
