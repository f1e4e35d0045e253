"""R-KV: the worked example, and which queries it is shown while decoding."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.errors import CacheError
from kvpress.formulas import redundancy
from kvpress.policy import EMPTY, Queries
from kvpress.policy.loading import load_policy, parse
from kvpress.policy.recipe import recalled

SPEC = "r_kv:budget=24,recent=4,interval=5"


def test_the_worked_example() -> None:
    keys = torch.tensor([(1, 0), (0.9, 0.1), (0, 1), (0.95, 0.05)])[None, None]
    found = redundancy.redundancy(keys, torch.ones(1, 1, 4, dtype=torch.bool), 0.5)
    assert found.flatten().tolist() == pytest.approx([0.32792, 0.26262, 0.20755, 0.20190], abs=1e-5)
    score = 0.1 * torch.tensor([0.4, 0.3, 0.2, 0.1]) - 0.9 * found
    assert score.flatten().tolist() == pytest.approx(
        [-0.25513, -0.20636, -0.16680, -0.17171], abs=1e-5
    )


def test_blocks_of_rows_orders_of_slots_and_empty_ones_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    keys, place = torch.randn(2, 3, 40, 8, generator=draw), torch.arange(40).expand(2, 3, -1)
    queries = Queries(torch.randn(2, 6, 12, 8, generator=draw), 0.3, 0.0)
    policy = load_policy("r_kv", alike=0.1)
    once = policy.score(helpers.shown(keys, None, place, asked=queries))
    monkeypatch.setattr(redundancy, "_MOST", 2 * 3 * 40 * 7)
    torch.testing.assert_close(policy.score(helpers.shown(keys, None, place, asked=queries)), once)
    order = torch.randperm(40, generator=draw)
    mixed = policy.score(helpers.shown(keys[:, :, order], None, place[..., order], asked=queries))
    torch.testing.assert_close(mixed, once[..., order])
    more = torch.cat([torch.full((2, 3, 9), EMPTY), place], -1)
    wider = torch.cat([torch.randn(2, 3, 9, 8, generator=draw), keys], 2)
    torch.testing.assert_close(
        policy.score(helpers.shown(wider, None, more, asked=queries))[..., 9:], once
    )


def test_the_largest_logit_of_a_group_counts_and_the_window_is_no_part_of_the_softmax() -> None:
    draw = torch.Generator().manual_seed(1)
    keys, query = torch.randn(1, 1, 10, 4, generator=draw), torch.randn(1, 2, 3, 4, generator=draw)
    open_BHS = (torch.arange(10) < 7)[None, None]
    found = redundancy.looked_at(query, keys, open_BHS, 0.5, 0.0)[0, 0]
    logits_NQS = query[0] @ keys[0, 0, :7].mT * 0.5
    torch.testing.assert_close(found[:7], logits_NQS.amax(0).softmax(-1).mean(0))
    assert found[7:].tolist() == [0.0] * 3


class Seen:
    """The queries that a policy is shown."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: list[tuple[int, torch.Tensor]] = []
        score = type(load_policy("r_kv")).score

        def see(policy: Any, own: Any) -> Any:
            if own.layer == 1:
                self.given.append((int(own.seen_B[0]), own.queries.query_BNQD.clone()))
            return score(policy, own)

        monkeypatch.setattr(type(load_policy("r_kv")), "score", see)


@torch.no_grad()
@pytest.mark.parametrize("drafts", [0, 3])
def test_scores_are_shown_the_last_queries_while_decoding(
    drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, model, ids = Seen(monkeypatch), helpers.tiny(), helpers.prompt(1, 60)
    asked: list[torch.Tensor] = []
    with kvpress.attach(model, SPEC) as engine:
        cache = engine.new_cache()
        model(ids[:, :40], past_key_values=cache)
        layer = model.model.layers[1].self_attn.q_proj
        handle = layer.register_forward_hook(lambda _m, _i, out: asked.append(out))
        at = 40
        while at < 60:
            if drafts:
                cache.activate_past_recording()
            model(ids[:, at : at + max(1, drafts)], past_key_values=cache)
            at += max(1, drafts)
        model(ids[:, -1:], past_key_values=cache)
        handle.remove()
    decoding = [(at, query) for at, query in seen.given if at > 40]
    assert len(decoding) >= 3
    flat = torch.cat(
        asked, 1
    )  # [1, tokens, N · D], not yet turned: lengths are those of the turned
    for at, query in decoding:
        first = at - 40 - 4
        if first < 0:
            continue
        expected = flat[:, first : first + 4].view(1, 4, query.shape[1], -1).transpose(1, 2)
        torch.testing.assert_close(query.norm(dim=-1), expected.norm(dim=-1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_forks_files_and_beams_go_on_as_the_cache_does(tmp_path: Any) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 70)
    with kvpress.attach(model, SPEC) as engine:
        cache = engine.new_cache()
        model(ids[:, :40], past_key_values=cache)
        for at in range(40, 47):
            model(ids[:, at : at + 1], past_key_values=cache)
        fork = cache.fork()
        cache.save(tmp_path / "cache")
        loaded = engine.load_cache(tmp_path / "cache")
        fork.reorder_cache(torch.tensor([1, 0]))
        for at in range(47, 58):
            token = ids[:, at : at + 1]
            ours = model(token, past_key_values=cache).logits
            assert torch.equal(model(token, past_key_values=loaded).logits, ours)
            turned = model(token.flip(0), past_key_values=fork).logits
            torch.testing.assert_close(turned.flip(0), ours)
        assert helpers.positions(cache) == helpers.positions(loaded)
        assert cache.states[0].sequences.nbytes > 0
        with pytest.raises(CacheError, match="last queries"):
            cache.crop(-1)


def test_nothing_is_kept_where_nothing_is_evicted_while_decoding() -> None:
    assert recalled(parse("r_kv:interval=0")) == 0
    assert recalled(parse("r_kv")) == 8
    assert parse("r_kv+quant").watched == parse("h2o+quant").watched


def test_a_turn_shorter_than_the_window_is_scored_by_the_queries_before_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, model, ids = Seen(monkeypatch), helpers.tiny(), helpers.prompt(1, 60)
    with kvpress.attach(model, "r_kv:budget=24,recent=8,interval=5") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids[:, :40], past_key_values=cache)
        model(ids[:, 40:42], past_key_values=cache)
        model(ids[:, 42:43], past_key_values=cache)
        model(ids[:, 43:53], past_key_values=cache)
    assert [query.shape[2] for _, query in seen.given] == [40, 8, 10]


def test_copies_among_the_last_tokens_count() -> None:
    """Two of three copies say what another one says; the last token is the one that does not."""
    keys = torch.eye(8)[[0, 1, 0, 2, 3, 0]][None, None]
    asked = Queries(torch.zeros(1, 1, 1, 8), 1.0, 0.0)
    score = load_policy("r_kv", recent=1, pool=1).score(helpers.shown(keys, asked=asked))[0, 0]
    assert score[0] < score[2] < score[1]
