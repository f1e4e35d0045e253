"""Keyformer against its specification: the worked example and the property tests."""

from __future__ import annotations

import math
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress import ops
from kvpress.formulas.noise import NO_QUERY, gumbel
from kvpress.formulas.ranking import drop_one, keep_top, protect
from kvpress.formulas.sums import Observation, over_group, step_sums
from kvpress.ops import Logits, Noise, Reduction
from kvpress.pipe.stages.observe import prompt_sums
from kvpress.policy.loading import load_policy
from kvpress.policy.slots import Slots, Step

NONE = torch.tensor([0])  # first tokens that are protected
ZETA = torch.tensor([0.0, -1.5, 1.0, 0.2, -1.0])


def logits_as_states(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose products are these logits: identity queries, their columns as keys."""
    new, slots = logits.shape
    return torch.eye(new)[None, None], logits.T.contiguous()[None, None].expand(1, 1, slots, new)


def example() -> torch.Tensor:
    rows = [[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 1, 0], [1, 1, 0, 0]]
    return torch.tensor(rows, dtype=torch.float32)


def sums(logits: torch.Tensor, noise: str = "none", tau: float = 1.0, **kw: Any) -> torch.Tensor:
    query, key = logits_as_states(logits)
    position = torch.arange(logits.shape[1])[None, None]
    window = kw.get("window", logits.shape[0])
    seed, layer = kw.get("seed", 0), kw.get("layer", 0)
    # The reference, so that tests can put the worked example's noise in place of the generator's.
    reference = ops.implementation("attention_sums", "reference")
    draw = Noise(noise, tau, seed, layer)
    return reference(query, key, position, Logits(1.0), Reduction(window), draw)[0, 0]


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example's noise instead of the generator's: ζ by key position."""
    import kvpress.csrc.attention_sums.reference as reference

    import kvpress.formulas.sums as observe

    def zeta(seed: int, layer: int, head: Any, query: Any, key: torch.Tensor) -> torch.Tensor:
        return ZETA[key] + 0.0 * (head + query)

    monkeypatch.setattr(reference, "exponential", lambda *a: torch.exp(-zeta(*a)))
    monkeypatch.setattr(observe, "gumbel", zeta)


def slots_of(mass: torch.Tensor, position: list[int], seen: int, attention: Any = None) -> Slots:
    where = torch.tensor(position)[None, None]
    return Slots(0, where, torch.tensor([seen]), 1, {}.__getitem__, attention, mass[None, None])


def test_worked_example_without_noise() -> None:
    f = sums(example())
    torch.testing.assert_close(
        f, torch.tensor([2.76183, 0.72450, 0.37920, 0.13447]), atol=1e-5, rtol=0
    )
    protected = protect(torch.arange(4)[None, None], torch.tensor([4]), NONE, torch.tensor([[1]]))
    kept = keep_top(f[None, None], torch.arange(4)[None, None], protected, torch.tensor([[3]]))
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 1, 3]


def test_worked_example_with_frozen_noise_promotes_token_3(frozen: None) -> None:
    policy = load_policy("keyformer", budget=3, recent=1, noise="frozen", horizon=4)
    f = sums(example(), "frozen")
    torch.testing.assert_close(
        f, torch.tensor([2.79089, 0.17422, 0.86675, 0.16813]), atol=1e-5, rtol=0
    )
    position = torch.arange(4)[None, None]
    protected = protect(position, torch.tensor([4]), NONE, torch.tensor([[1]]))
    kept = keep_top(f[None, None], position, protected, torch.tensor([[3]]))
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 2, 3]

    request = policy.observe(Step(layer=0, decoded=1, new_tokens=1, horizon=99))
    assert request.tau == pytest.approx(1.25)
    held = [0, 2, 3, 4]
    weights = torch.softmax(torch.tensor([0.5, 0.0, 5.0, 2.0]), -1)[None, None]
    g = step_sums(weights, torch.tensor(held)[None, None], torch.tensor([5]), 0, request)
    expected = torch.tensor([0.02131, 0.03179, 0.91512, 0.03179])
    torch.testing.assert_close(g[0, 0], expected, atol=1e-5, rtol=0)

    before = slots_of(torch.cat([f[[0, 2, 3]], torch.zeros(1)]), held, 5, g)
    mass = policy.accumulate(before)
    expected = torch.tensor([2.81220, 0.89854, 1.08325, 0.03179])
    torch.testing.assert_close(mass[0, 0], expected, atol=1e-5, rtol=0)
    slots = slots_of(mass[0, 0], held, 5)
    protected = protect(slots.position_BHS, slots.seen_B, NONE, torch.tensor([[1]]))
    dropped = drop_one(policy.score(slots), slots.position_BHS, protected)
    assert held[int(dropped)] == 2  # token 3 left the window and displaces key 2: {0, 3, 4} stay


@pytest.mark.parametrize("noise", ["fresh", "frozen", "none"])
def test_mass_is_one_per_query_and_head(noise: str) -> None:
    """Property 2."""
    model, ids = helpers.tiny(), helpers.prompt(2, 40)
    with kvpress.attach(model, f"keyformer:budget=1.0,noise={noise}") as engine:
        cache = engine.new_cache(max_new_tokens=6)
        helpers.greedy(model, ids, torch.ones_like(ids), 6, cache)
    for state in cache.states:
        total = state.store.dense("mass").sum(-1)
        torch.testing.assert_close(total, torch.full((2, 2), 45.0 * 3), rtol=1e-5, atol=0)


def test_eviction_subtracts_the_evicted_mass() -> None:
    """Property 2, second half: what stays carries exactly what it had."""
    model, ids = helpers.tiny(), helpers.prompt(1, 40)
    masses = {}
    for budget in ("1.0", "0.5"):
        with kvpress.attach(model, f"keyformer:budget={budget}") as engine, torch.no_grad():
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            store = cache.states[1].store
            masses[budget] = store.dense("position").long(), store.dense("mass")
    position, mass = masses["0.5"]
    assert torch.equal(mass, masses["1.0"][1].gather(-1, position))


def test_without_noise_and_temperature_it_is_h2o() -> None:
    """Property 3."""
    model, ids = helpers.tiny(), helpers.prompt(2, 50)
    caches = []
    for recipe in ("keyformer:noise=none,tau_end=1,recent_ratio=0.5", "h2o"):
        with kvpress.attach(model, recipe) as engine:
            engine.generate(ids, max_new_tokens=20, do_sample=False)
            caches.append(engine.cache)
    for row in range(2):
        assert helpers.positions(caches[0], row) == helpers.positions(caches[1], row)
    for a, b in zip(caches[0].states, caches[1].states, strict=True):
        assert torch.equal(a.store.dense("mass"), b.store.dense("mass"))


def test_temperature_is_linear_and_clamped() -> None:
    """Property 4."""
    policy = load_policy("keyformer")
    tau = [policy.observe(Step(0, t, 1, 8)).tau for t in (0, 2, 4, 8, 80)]
    assert tau == [1.0, 1.25, 1.5, 2.0, 2.0]
    assert load_policy("keyformer", horizon=4).observe(Step(0, 2, 1, 8)).tau == 1.5


def test_shift_and_scale_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Property 5."""
    import kvpress.csrc.attention_sums.reference as reference

    x, zeta = torch.randn(6, 9), torch.randn(9)

    def with_noise(noise: torch.Tensor, scale: float = 1.0, tau: float = 1.5) -> torch.Tensor:
        monkeypatch.setattr(
            reference,
            "exponential",
            lambda s, la, h, q, key: torch.exp(-noise[key]) + 0.0 * (h + q),
        )
        return sums(x * scale, "frozen", tau)

    plain = with_noise(zeta)
    torch.testing.assert_close(with_noise(zeta + 3.0), plain)
    torch.testing.assert_close(with_noise(zeta * 2, 2.0, 3.0), plain)


def test_extreme_temperatures() -> None:
    """Property 6."""
    weights = torch.softmax(torch.randn(1, 1, 12), -1)
    position, seen = torch.arange(12)[None, None], torch.tensor([12])
    hot = step_sums(weights, position, seen, 0, Observation(noise="fresh", tau=1e6))
    torch.testing.assert_close(hot, torch.full((1, 1, 12), 1 / 12), atol=1e-4, rtol=0)
    cold = step_sums(weights, position, seen, 0, Observation(noise="fresh", tau=1e-3))
    zeta = gumbel(0, 0, torch.tensor([0]), torch.tensor([11]), position[0])
    assert int(cold.argmax()) == int((weights[0].log() + zeta).argmax())
    assert float(cold.max()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("logit", "expected"), [(math.log(4), 0.7172), (3.0, 0.8870), (0.0, 0.5)])
def test_expected_fresh_softmax_of_two_tokens(logit: float, expected: float) -> None:
    """Property 7: E[g_1] = (1 − r + r ln r)/(1 − r)², r = exp(−a), by Monte Carlo over queries."""
    draws = 200_000
    zeta = gumbel(1, 0, torch.tensor(0), torch.arange(draws)[:, None], torch.arange(2)[None])
    g = torch.softmax(torch.tensor([logit, 0.0]) + zeta, -1)[:, 0]
    assert float(g.mean()) == pytest.approx(expected, abs=4 * float(g.std()) / math.sqrt(draws))


def test_noise_raises_the_entropy_of_the_mean_and_lowers_that_of_a_draw() -> None:
    """Property 8."""
    x = torch.randn(1024) * 1.7
    zeta = gumbel(0, 0, torch.tensor(0), torch.arange(2000)[:, None], torch.arange(1024)[None])
    draws = torch.softmax(x + zeta, -1)

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return -(p * p.clamp_min(1e-30).log()).sum(-1)

    plain = entropy(torch.softmax(x, -1))
    assert entropy(draws.mean(0)) > plain > entropy(draws).mean()


@pytest.mark.parametrize("noise", ["fresh", "frozen"])
def test_noise_never_changes_the_output_before_the_first_eviction(noise: str) -> None:
    """Property 9."""
    model, ids = helpers.tiny(), helpers.prompt(1, 30)
    logits = {}
    recipes = ("full", "keyformer:budget=0.3,noise=none", f"keyformer:budget=0.3,noise={noise}")
    for recipe in recipes:
        with torch.no_grad(), kvpress.attach(model, recipe) as engine:
            logits[recipe] = model(ids, past_key_values=engine.new_cache()).logits
    full, plain, noisy = (logits[recipe] for recipe in recipes)
    assert torch.equal(plain, noisy)
    torch.testing.assert_close(noisy, full, rtol=1e-5, atol=1e-6)  # another order of summation


@pytest.mark.parametrize("tau", [1.0, 1.7])
@pytest.mark.parametrize("noise", ["none", "fresh", "frozen"])
def test_blockwise_equals_dense(noise: str, tau: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property 10, in blocks of one, five and all queries."""
    import kvpress.csrc.attention_sums.reference as reference

    batch, heads, group, tokens, width = 2, 2, 3, 37, 16
    query = torch.randn(batch, heads * group, tokens, width)
    key = torch.randn(batch, heads, tokens, width)
    position = torch.arange(tokens).expand(batch, heads, tokens)
    x = torch.einsum("bhgqd,bhkd->bhgqk", query.unflatten(1, (heads, group)), key).double() * 0.25
    if noise != "none":
        head = torch.arange(heads * group).view(heads, group, 1, 1)
        own = torch.arange(tokens)[:, None] if noise == "fresh" else torch.tensor(NO_QUERY)
        x = x + gumbel(7, 4, head, own, torch.arange(tokens))
    x = (x / tau).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    dense = x.softmax(-1).sum(3).flatten(1, 2).float()
    for elements in (1, 5 * batch * heads * group * tokens, 1 << 30):
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", elements)
        sums = ops.implementation("attention_sums", "reference")
        given = sums(query, key, position, Logits(0.25), Reduction(tokens), Noise(noise, tau, 7, 4))
        torch.testing.assert_close(given, dense, rtol=1e-5, atol=1e-6)


def test_frozen_identity_with_the_extra_value_column() -> None:
    """Property 10: N_q, an extra value column exp(ζ) in the attention, gives the noisy sums."""
    tokens = 21
    x = torch.randn(tokens, tokens, dtype=torch.double)
    x = x.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    zeta = gumbel(5, 0, torch.tensor(0), torch.tensor(NO_QUERY), torch.arange(tokens)).double()
    lse = x.logsumexp(-1)
    column = x.softmax(-1) @ zeta.exp()
    f = zeta.exp() * (x - lse[:, None] - column.log()[:, None]).exp().sum(0)
    torch.testing.assert_close(f, (x + zeta).softmax(-1).sum(0), rtol=1e-12, atol=0)
    finite = x.clamp_min(-50).float()
    given = sums(finite, "frozen", seed=5)
    torch.testing.assert_close(given, f.float(), rtol=1e-5, atol=1e-6)


def test_prompt_and_decode_see_the_same_noise() -> None:
    """A query scores alike as the last of a prompt and as a decode step."""
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    position = torch.arange(9).expand(1, 2, 9)
    last = ops.attention_sums(
        query, key, position, Logits(1.0), Reduction(1), Noise("fresh", 1.3, 2, 6)
    )
    logits = torch.einsum("bhgd,bhkd->bhgk", query[:, :, -1].unflatten(1, (2, 2)), key)
    request = Observation(noise="fresh", tau=1.3, seed=2)
    weights = logits.softmax(-1).flatten(1, 2)
    step = step_sums(weights, position, torch.tensor([9]), 6, request)
    torch.testing.assert_close(step, over_group(last, 2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("noise", ["none", "fresh", "frozen"])
def test_raising_a_key_never_lowers_its_score(noise: str) -> None:
    """Property 12."""
    x = torch.randn(12, 12)
    for key in range(12):
        higher = x.clone()
        higher[:, key] += 0.7
        assert float(sums(higher, noise)[key]) >= float(sums(x, noise)[key])


def test_decode_of_1000_tokens_keeps_exactly_k() -> None:
    """Property 1."""
    model, ids = (
        helpers.tiny(num_hidden_layers=1, max_position_embeddings=2048),
        helpers.prompt(1, 40),
    )
    with kvpress.attach(model, "keyformer:budget=0.5prompt") as engine:
        engine.generate(ids, max_new_tokens=1001, do_sample=False)
        rows = helpers.positions(engine.cache)[0]
        assert engine.cache.check_integrity()
    for row in rows:
        assert len(row) == 20
        assert row[-6:] == list(range(1034, 1040))  # w = 0.3 · k last tokens


def test_generated_tokens_can_become_key_tokens() -> None:
    """Property 13, in generation: some token outside prompt and window stays."""
    model, ids = helpers.tiny(), helpers.prompt(1, 40)
    with kvpress.attach(model, "keyformer:budget=0.5,normalise_age=true") as engine:
        engine.generate(ids, max_new_tokens=61, do_sample=False)
        rows = [row for heads in helpers.positions(engine.cache) for row in heads]
    assert any(40 <= p < 94 for row in rows for p in row)


def test_same_seed_same_set_and_other_seed_another() -> None:
    """Property 15."""
    model, ids = helpers.tiny(), helpers.prompt(1, 60)
    kept = []
    for seed in (1, 1, 2):
        with kvpress.attach(model, f"keyformer:noise=frozen,seed={seed}") as engine:
            engine.generate(ids, max_new_tokens=4, do_sample=False)
            kept.append(helpers.positions(engine.cache))
    assert kept[0] == kept[1] != kept[2]


def test_group_of_one_equals_multi_head_attention() -> None:
    """Property 15: repeating KV heads for every query head changes nothing."""
    query, key = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8)
    position = torch.arange(12).expand(1, 2, 12)
    choices = (Logits(1.0), Reduction(12), Noise("fresh", 1.0, 0, 0))
    grouped = ops.attention_sums(query, key, position, *choices)
    repeated = key.repeat_interleave(2, 1)
    single = ops.attention_sums(query, repeated, position[:, :1].expand(1, 4, 12), *choices)
    torch.testing.assert_close(single, grouped, rtol=1e-5, atol=1e-6)
    assert torch.equal(over_group(single, 4), single)


def test_scoring_a_window_weighs_it_like_the_whole_prompt() -> None:
    policy = load_policy("keyformer", window=4)
    observation = policy.observe(Step(0, 0, 10, 1))
    assert (observation.window, observation.weight) == (4, 2.5)
    query, key = torch.randn(1, 2, 10, 8), torch.randn(1, 1, 10, 8)
    position = torch.arange(10)[None, None]
    total = prompt_sums(query, key, position, 0, observation, 0.3, 0.0).sum()
    torch.testing.assert_close(total, torch.tensor(20.0))
    assert policy.observe(Step(0, 5, 1, 9)).weight == 1.0


def test_age_normalisation_divides_by_the_queries_that_could_see_a_token() -> None:
    policy = load_policy("keyformer", normalise_age=True)
    score = policy.score(slots_of(torch.tensor([4.0, 3.0, 2.0, 1.0]), [0, 1, 2, 3], 4))
    assert score.tolist() == [[[1.0, 1.0, 1.0, 1.0]]]
