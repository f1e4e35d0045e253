"""Steps that read what a retrieval head saw before the first layer; and loads that begin then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import tiered
import torch
from torch import Tensor

import kvpress
from kvpress import host
from kvpress.errors import CacheError, PolicyError, TierError
from kvpress.formulas.head_scores import scores
from kvpress.hf import foresight
from kvpress.store.tiers.directory import NOWHERE, Directory

TOKENS = 560
SOME = "specontext:head=self,read=160,sure=0"


def run(model: Any, recipe: str, new: int = 6, **caps: Any) -> tuple[list[Tensor], Any]:
    """Logits of a prompt and of steps behind it, and the cache."""
    with tiered.attached(model, recipe, caps) as engine:
        cache = engine.new_cache(max_new_tokens=64)
        found = tiered.feed(model, cache, helpers.prompt(2, TOKENS), [TOKENS])
        found += tiered.decode(model, cache, found[-1], new)
        tiered.check(engine, cache)
        return found, cache


def far(given: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True))


def same(given: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


class Oracle:
    """A head that looks at the tokens with some ids only; it reads so many ids back."""

    heads, width, group, fingerprint = 2, 4, 1, "oracle"

    def __init__(self, wanted: set[int], reach: int = 0) -> None:
        self.wanted, self.reach = wanted, reach

    def project(self, id_BT: Tensor, position_BQ: Tensor) -> tuple[Tensor, Tensor]:
        id_BQ = id_BT[:, : position_BQ.shape[1]] if self.reach else id_BT
        hit_BQ = torch.isin(id_BQ, torch.tensor(sorted(self.wanted))).float() * 20
        key_BHQD = hit_BQ[:, None, :, None].expand(-1, 2, -1, 4).contiguous()
        return torch.ones_like(key_BHQD), key_BHQD


def with_head(monkeypatch: pytest.MonkeyPatch, head: Any) -> None:
    monkeypatch.setattr(foresight, "load_head", lambda name, model: head)


@pytest.mark.parametrize("kind", ["", "+quant", "+think+quant"])
def test_who_reads_everything_misses_nothing(kind: str) -> None:
    model = tiered.model()
    wanted, _ = run(model, kind[1:] or "full")
    given, cache = run(model, "specontext:head=self,read=1.0,page=64" + kind)
    assert far(given, wanted) < 1e-4
    assert all(layer.reads.missed_max == 0 for layer in cache.report().layers)


def test_all_layers_read_the_pages_that_the_head_saw() -> None:
    model = tiered.model()
    head = foresight.load_head("self", model)
    given, cache = run(model, SOME)
    wanted, _ = run(model, "full")
    assert torch.equal(given[0], wanted[0]), "prompts are attended to in full"
    assert far(given, wanted) > 0
    ids = cache.ids.all().long()
    position = torch.arange(ids.shape[1])[None].expand(2, -1)
    query, key = head.project(ids, position)
    share = scores(query[:, :, -1], key, head.group)
    share = share / share.sum(-1, keepdim=True)
    for state in cache.states:
        found = state.reads.last[1]
        (own,) = found.chosen
        pages = int(state.rows.counts[0]) // 32 - 2
        for row in range(4):
            of_page = share.flatten(0, 1)[row, : pages * 32].view(pages, 32).sum(1)
            held = own.place_rW[row, : int(own.pages_r[row])].tolist()
            always = {0, *(w for w in range(pages) if w * 32 + 32 > ids.shape[1] - 64)}
            rest = [w for w in of_page.argsort(descending=True).tolist() if w not in always]
            most = [w for w in held if w not in always and w < pages]
            assert sorted(most) == sorted(rest[: len(most)]) and most


def test_a_head_leads_to_what_it_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiered.model()
    ids = helpers.prompt(2, TOKENS)
    ids[ids == 7] = 8
    ids[0, 200] = ids[1, 330] = 7
    for reach in (0, 3):
        with_head(monkeypatch, Oracle({7}, reach))
        with kvpress.attach(model, "specontext:head=any,read=200,sure=0.5") as engine:
            cache = engine.new_cache()
            logits = tiered.feed(model, cache, ids, [TOKENS])
            tiered.decode(model, cache, logits[-1], 3)
            for state in cache.states:
                (own,) = state.reads.last[1].chosen
                for row in range(4):
                    token = (200, 330)[row // 2] + reach  # it looked at what follows by so much
                    assert token // 32 in own.place_rW[row].tolist()


@pytest.mark.parametrize("recipe", [SOME, "snapkv:budget=0.6+" + SOME, SOME + "+quant"])
def test_a_padded_row_reads_what_it_reads_alone(recipe: str) -> None:
    model, lengths = tiered.model(), [500, 340]
    ids, mask = helpers.padded(lengths, "left")
    with kvpress.attach(model, recipe) as engine:
        together = helpers.greedy(model, ids, mask, 6, engine.new_cache())
        for row, length in enumerate(lengths):
            alone = ids[row : row + 1, -length:]
            found = helpers.greedy(model, alone, torch.ones_like(alone), 6, engine.new_cache())
            assert found[0].tolist() == together[row].tolist()


def test_the_keys_of_a_head_are_the_same_however_tokens_came() -> None:
    model, ids = tiered.model(), helpers.prompt(2, TOKENS)
    with kvpress.attach(model, SOME) as engine:
        caches = [engine.new_cache() for _ in range(3)]
        tiered.feed(model, caches[0], ids, [TOKENS])
        tiered.feed(model, caches[1], ids, [100, 1, 300, TOKENS - 401])
        tiered.feed(model, caches[2], torch.cat([ids, helpers.prompt(2, 9, 5)], 1), [TOKENS + 9])
        caches[2].crop(-9)
        token = helpers.prompt(2, 1, 3)
        with torch.no_grad():
            found = [model(token, past_key_values=cache).logits for cache in caches]
        shares = [cache.context.outlook.share_BHS for cache in caches]
        assert all(torch.allclose(shares[0], x, atol=1e-6) for x in shares)
        assert all(float((found[0] - x).abs().max()) < 1e-4 for x in found)


@pytest.mark.parametrize("caps", [{}, {"device": "2MiB", "host": "16MiB"}])
def test_saved_forked_and_selected_caches_go_on_alike(caps: Any, tmp_path: Path) -> None:
    model = tiered.model()
    with tiered.attached(model, SOME, caps) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(2, TOKENS), [TOKENS])
        logits += tiered.decode(model, cache, logits[-1], 2)
        cache.save(tmp_path / "cache")
        others = [cache.fork(), engine.load_cache(tmp_path / "cache"), cache.fork()]
        others[2].reorder_cache(torch.tensor([1, 0]))
        wanted = tiered.decode(model, cache, logits[-1], 4)
        for other in others[:2]:
            assert same(tiered.decode(model, other, logits[-1], 4), wanted)
        found = tiered.decode(model, others[2], logits[-1].flip(0), 4)
        assert far([x.flip(0) for x in found], wanted) < 1e-4
        tiered.check(engine, cache, *others)


def test_a_pass_that_failed_leaves_no_key_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiered.model(), helpers.prompt(2, TOKENS)
    with kvpress.attach(model, SOME) as engine:
        cache = engine.new_cache()
        tiered.feed(model, cache, ids, [TOKENS])
        layer = model.model.layers[0]
        with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="on purpose"):
            broken.setattr(layer, "forward", _fails)
            model(helpers.prompt(2, 1, 1), past_key_values=cache)
        other = engine.new_cache()
        tiered.feed(model, other, ids, [TOKENS])
        token = helpers.prompt(2, 1, 2)
        with torch.no_grad():
            found = [model(token, past_key_values=x).logits for x in (cache, other)]
        assert torch.equal(*found)


def _fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("on purpose")


def test_a_head_that_is_not_sure_leaves_the_choice_to_boxes() -> None:
    model = tiered.model()
    wanted, _ = run(model, "quest:dense=0,read=160,cells=0")
    given, cache = run(model, "specontext:head=self,read=160,sure=1")
    assert far(given, wanted) < 1e-6
    report = cache.report()
    assert all(layer.reads.unsure == layer.reads.steps for layer in report.layers)
    assert "chose by boxes: the retrieval head was not sure." in str(report)


@pytest.mark.parametrize("way", tiered.LOWER)
@pytest.mark.parametrize("recipe", [SOME, SOME + "+quant", "snapkv:budget=0.7+" + SOME])
def test_loads_that_begin_before_the_first_layer_change_no_bit(
    recipe: str, way: str, tmp_path: Path
) -> None:
    model = tiered.model()
    expected, _ = run(model, recipe, 40, **tiered.ALL)
    given, cache = run(model, recipe, 40, **tiered.caps(way, model, recipe, 2, tmp_path))
    assert same(given, expected)
    tiers = cache.report().tiers
    if "snapkv" not in recipe:
        assert tiers.hits["device"] and tiers.hits["host"] + tiers.hits["disk"]


def test_what_cannot_be_read_ahead_is_an_error_where_it_is_wanted(tmp_path: Path) -> None:
    model = tiered.model()
    caps = tiered.caps("disk", model, SOME, 1, tmp_path)
    with tiered.attached(model, SOME, caps) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS), [TOKENS])
        vault = engine.spec.tiers.vault
        file = vault._parts.disk
        read, file.read = file.read, lambda rows, arena_X, again=False: [5] * len(rows)
        with pytest.raises(TierError, match="could not be read"):
            tiered.decode(model, cache, logits[-1], 6)
        file.read = read
        other = engine.new_cache()
        found = tiered.feed(model, other, helpers.prompt(1, TOKENS), [TOKENS])
        tiered.decode(model, other, found[-1], 3)
        assert tiered.nothing_stays_in_flight(engine.spec.tiers)
        tiered.check(engine, other)


def test_pages_on_their_way_may_be_dropped(tmp_path: Path) -> None:
    model = tiered.model()
    caps = tiered.caps("host", model, SOME, 1, tmp_path)
    with tiered.attached(model, SOME, caps) as engine:
        held = []
        for seed in range(4):
            cache = engine.new_cache()
            logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS, seed), [TOKENS])
            tiered.decode(model, cache, logits[-1], 2)
            layer = model.model.layers[0]
            whole, layer.forward = layer.forward, _fails
            with pytest.raises(RuntimeError):
                model(logits[-1][:, -1:].argmax(-1), past_key_values=cache)
            layer.forward = whole
            del cache, logits
            held.append(sum(tiered.used(engine.spec.tiers)))
        assert max(held) == held[0], "the engine keeps the newest cache alone"
        assert tiered.nothing_stays_in_flight(engine.spec.tiers)


def test_the_keys_of_a_head_are_in_the_report() -> None:
    model = tiered.model()
    _, quest = run(model, "quest")
    _, ours = run(model, SOME)
    more = ours.report().bytes_ids - quest.report().bytes_ids
    assert more >= 2 * 2 * (TOKENS + 6) * 32 * 4


def test_what_a_head_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiered.model()
    with pytest.raises(PolicyError, match="68 tokens"):
        kvpress.attach(model, "specontext:head=self,read=60")
    with pytest.raises(PolicyError, match="neither a head nor a file"):
        kvpress.attach(model, "specontext:head=nobody")
    with kvpress.attach(model, SOME) as engine, torch.no_grad():
        cache = engine.new_cache()
        inputs = model.get_input_embeddings()(helpers.prompt(1, 40))
        with pytest.raises(CacheError, match="came as embeddings"):
            model(inputs_embeds=inputs, past_key_values=cache)
    head = Oracle({1})
    head.heads = 3  # type: ignore[misc]
    with_head(monkeypatch, head)
    with pytest.raises(PolicyError, match="has 3 KV heads, but layer 0 of this model has 2"):
        kvpress.attach(model, SOME)


@pytest.mark.parametrize("way", ["host", "disk"])
def test_early_loads_that_nobody_waits_for_leak_no_place(way: str, tmp_path: Path) -> None:
    model = tiered.model()
    caps = tiered.caps(way, model, SOME, 2, tmp_path)
    with tiered.attached(model, SOME, caps) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS), [TOKENS])
        logits += tiered.decode(model, cache, logits[-1], 2)
        token = logits[-1][:, -1:].argmax(-1)
        whole = model.model.layers[0].forward
        for _ in range(3):
            model.model.layers[0].forward = _fails
            with pytest.raises(RuntimeError, match="on purpose"):
                model(token, past_key_values=cache)
            model.model.layers[0].forward = whole
            tiered.decode(model, cache, logits[-1], 1)
            tiered.check(engine, cache)
        cache.activate_past_recording()
        for _ in range(3):
            tiered.decode(model, cache, logits[-1], 2)
            cache.crop(-1)
        cache.stop_past_recording()
        tiered.decode(model, cache, logits[-1], 2)
        tiered.check(engine, cache)


def test_pages_that_others_chose_since_do_not_become_idle() -> None:
    own = Directory()
    id_A = own.enter(4)
    own.choose(host.zeros(0), 0, id_A, 1)  # by some rows
    own.choose(host.zeros(0), 0, id_A[:2], 2)  # by a fork
    assert own.choose(id_A, 1, id_A[3:], 3).tolist() == id_A[2:3].tolist()
    own.forget(id_A[:2])
    again_A = own.enter(2)
    assert sorted(again_A.tolist()) == sorted(id_A[:2].tolist()), "numbers are used again"
    own.choose(host.zeros(0), 0, again_A, 4)
    assert not len(own.choose(id_A[:2], 2, host.zeros(0), 5)), "they are other pages now"
    assert not bool(own.idle_P[again_A].any())


def test_lists_of_idle_pages_do_not_grow_with_steps() -> None:
    model = tiered.model()
    with tiered.attached(model, SOME, tiered.ALL) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS), [TOKENS])
        tiered.decode(model, cache, logits[-1], 300)
        assert all(len(shelf.idle._queue) <= 256 for shelf in engine.spec.tiers._shelves.values())


def test_what_was_staged_is_not_taken_for_pages_that_got_its_numbers(tmp_path: Path) -> None:
    model = tiered.model()
    caps = tiered.caps("host", model, SOME, 1, tmp_path)
    with tiered.attached(model, SOME, caps) as engine:
        cache = engine.new_cache()
        logits = tiered.feed(model, cache, helpers.prompt(1, TOKENS), [TOKENS])
        tiered.decode(model, cache, logits[-1], 2)
        (shelf,) = {part.shelf for state in cache.states for part in state.rows.aging.parts}
        away_A = (shelf.directory.at_P == NOWHERE) & (shelf.directory.record_P != NOWHERE)
        id_A = away_A.nonzero().flatten()[:2]
        staged = shelf.early.stage(id_A)
        at_A = torch.full_like(id_A, NOWHERE)
        found = shelf.early.unstage(staged)
        assert found is staged
        found.find(id_A, at_A)
        copies, rows = shelf.pages[at_A].clone(), shelf.read(id_A)
        assert torch.equal(copies, rows)
        staged = shelf.early.stage(id_A)
        engine.spec.tiers.collect()  # frees numbers, which others may get
        assert shelf.early.unstage(staged) is None
        steps = cache.states[0].rows.aging.parts[0].steps
        steps._staged = shelf.early.stage(id_A)
        steps.expect(steps.chosen, steps.last, False)
        assert steps._staged is None, "a pass that failed left it"
