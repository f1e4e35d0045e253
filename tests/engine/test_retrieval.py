"""Decode steps that read some of the stored pages: which ones, what they miss, what stays exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import tiered
import torch
from torch import Tensor

import kvpress
from kvpress.errors import BudgetError, PolicyError
from kvpress.policy import Budget
from kvpress.store.base import KEY, POSITION, VALUE
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.tiers.tiers import Tiers

TOKENS = 700
EVERYTHING = [  # in pages as large as those of quantised slots
    "quest:dense=0,read=1.0,page=64",
    "leoam:read=1.0,early=1.0,page=64",
    "freekv:dense=0,read=1.0,page=64",
]
SOME = ["quest:dense=0,read=160", "leoam:read=0.3", "freekv:dense=0,read=160"]
KINDS = ["", "+quant", "+think+quant"]


def run(model: Any, recipe: str, new: int = 6, **caps: Any) -> tuple[list[Tensor], Any]:
    """Logits of a prompt and of steps behind it, and the cache."""
    with kvpress.attach(model, recipe, **caps) as engine:
        cache = engine.new_cache(max_new_tokens=64)
        found = tiered.feed(model, cache, helpers.prompt(2, TOKENS), [TOKENS])
        found += tiered.decode(model, cache, found[-1], new)
        assert cache.check_integrity()
        return found, cache


def far(given: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(given, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", EVERYTHING)
def test_who_reads_everything_misses_nothing(recipe: str, kind: str) -> None:
    model = tiered.model()
    wanted, _ = run(model, kind[1:] or "full")
    given, cache = run(model, recipe + kind)
    assert far(given, wanted) < 1e-4
    for layer in cache.report().layers:
        assert layer.reads.missed_max == 0 and layer.reads.tokens_read == layer.reads.tokens_held


@pytest.mark.parametrize("recipe", [*SOME, "quest:dense=0,top=90"])
def test_what_is_read_is_no_more_than_asked(recipe: str) -> None:
    model = tiered.model()
    wanted, _ = run(model, "full")
    given, cache = run(model, recipe)
    assert torch.equal(given[0], wanted[0]), "prompts are attended to in full"
    assert 0 < far(given, wanted) < 20
    for layer in cache.report().layers:
        assert layer.slots_kept == [[TOKENS + 6] * 2] * 2, "everything is kept"
        assert 0 < layer.reads.tokens_read < layer.reads.tokens_held + ("top" in recipe)
        if "read=160" in recipe:
            assert layer.reads.tokens_read <= 160


def layer_of(cache: Any, index: int = 1) -> Any:
    return cache.states[index]


def exact(state: Any, query_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[B, N, S]`, positions and values of all slots of a layer, in fp64."""
    key, value, position = (state.store.dense(name) for name in (KEY, VALUE, POSITION))
    batch, heads, _, width = key.shape
    query = query_BND.double().view(batch, heads, -1, width)
    logits = query @ key.double().mT * width**-0.5
    logits = logits.masked_fill((position < 0)[:, :, None], -torch.inf)
    return logits.softmax(-1).flatten(1, 2), position, value.double()


def attend(state: Any, query_BND: Tensor) -> tuple[Tensor, Any]:
    """What a step of a layer gives for these queries without storing anything."""
    from kvpress.pipe.stages import retrieve
    from kvpress.pipe.state.tokens import Tokens

    width = query_BND.shape[2]
    tokens = Tokens(query_BND[:, :, None], *(query_BND[:, :, None],) * 2, width**-0.5, 0.0)
    out, _ = retrieve.attend(state, None, tokens, False)
    return out[:, :, 0], state.reads.last[1]


def read_of(found: Any, state: Any) -> Tensor:
    """Which slots were read, in the order of `dense`: bool `[R, S]`."""
    rows = len(found.read_r)
    masks = []
    for own in found.chosen:
        size = own.part.layout.slots
        width = int(own.part.counts.max()) // size
        mask = torch.zeros(rows, width, dtype=torch.bool)
        row, entry = (own.place_rW >= 0).nonzero().unbind(1)
        mask[row, own.place_rW[row, entry].long()] = True
        masks.append(mask.repeat_interleave(size, 1))
    recent = state.store.aging.recent.dense(POSITION).flatten(0, 1) >= 0
    return torch.cat([*masks, recent], 1)


@pytest.mark.parametrize(
    "recipe",
    [
        *SOME[:2],
        "quest:dense=0,read=96+quant",
        "quest:dense=0,read=96,cells=4,candidates=2",
        "quest:dense=0,read=96,candidates=none+think+quant",
        "snapkv:budget=0.6+leoam",
    ],
)
@pytest.mark.parametrize("scale", [0.3, 3.0, 40.0])
def test_the_certificate_is_never_too_small(recipe: str, scale: float) -> None:
    _, cache = run(tiered.model(), recipe)
    state = layer_of(cache)
    torch.manual_seed(int(scale))
    for _ in range(8):
        query = torch.randn(2, 4, 32) * scale
        out, found = attend(state, query)
        weights, _, value = exact(state, query)
        read = read_of(found, state).view(2, 2, 1, -1).expand(-1, -1, 2, -1).flatten(1, 2)
        missed = weights.masked_fill(read, 0).sum(-1)
        assert bool((found.error_bN.double() + 1e-6 >= missed).all())
        assert not bool(found.error_bN.isnan().any())
        wanted = (weights.view(2, 2, 2, -1) @ value).flatten(1, 2)
        moved = (out.double() - wanted).norm(dim=-1)
        assert bool((found.move_bN.double() + 2e-3 * wanted.norm(dim=-1) + 1e-5 >= moved).all())


def test_the_largest_logits_are_found_exactly() -> None:
    _, cache = run(tiered.model(), "quest:dense=0,top=37,recent=0,sink=0")
    state = layer_of(cache)
    torch.manual_seed(0)
    for scale in (0.5, 5.0):
        query = torch.randn(2, 4, 32) * scale
        out, _ = attend(state, query)
        weights, _, value = exact(state, query)
        old = weights.shape[2] - state.store.aging.recent.dense(POSITION).shape[2]
        kept = torch.zeros_like(weights, dtype=torch.bool)
        kept.scatter_(2, weights[..., :old].topk(37, dim=2).indices, True)
        kept[..., old:] = True
        chosen = weights.masked_fill(~kept, 0)
        wanted = (chosen / chosen.sum(-1, keepdim=True)).view(2, 2, 2, -1) @ value
        torch.testing.assert_close(out.double(), wanted.flatten(1, 2), rtol=1e-4, atol=1e-5)


def test_mass_reads_the_fewest_pages_that_are_certified() -> None:
    _, cache = run(tiered.model(), "quest:dense=0,read=0.5,sink=0,recent=0")
    state = layer_of(cache)
    rule, recent = state.stores.retrieval, int(state.store.aging.recent.counts[0])
    torch.manual_seed(1)
    query = torch.randn(2, 4, 32) * 0.1

    def read(**changed: Any) -> Any:
        state.stores.__dict__["retrieval"] = rule._replace(**changed)
        return attend(state, query)[1]

    half = read()  # how small a share half of the pages certify: random keys are all alike
    least = float(half.error_bN.max())
    found = read(read=Budget.parse("1.0"), mass=least)
    assert bool((found.error_bN <= least).all()) and found.short == 0
    pages_r = found.chosen[0].pages_r
    assert bool((pages_r <= half.chosen[0].pages_r).all()) and int(pages_r.min()) > 0
    for row, pages in enumerate(pages_r.tolist()):  # with one page less it is not
        less = read(read=Budget.parse(recent + 32 * pages - 32))
        assert float(less.error_bN.view(-1, 2)[row].max()) > least
    few = read(read=Budget.parse(recent + 64), mass=least)
    assert few.short == 4 and bool((few.chosen[0].pages_r == 2).all())


def test_pages_of_sinks_and_of_the_last_tokens_are_always_read() -> None:
    _, cache = run(tiered.model(), "quest:dense=0,read=256,sink=40,recent=200")
    state = layer_of(cache)
    for seed in range(5):
        torch.manual_seed(seed)
        _, found = attend(state, torch.randn(2, 4, 32))
        position = state.store.dense(POSITION).flatten(0, 1)
        read = read_of(found, state)
        seen = TOKENS + 6
        assert bool(read[(position >= 0) & (position < 40)].all())
        assert bool(read[position >= seen - 200].all())
        assert not bool(read.all())


def test_a_query_that_has_not_turned_chooses_by_the_one_before() -> None:
    model = tiered.model()
    always, cache = run(model, "freekv:dense=0,read=160,turn=1.0")
    wanted, _ = run(model, "quest:dense=0,read=160")
    assert far(always, wanted) == 0
    assert all(layer.reads.turned == layer.reads.steps for layer in cache.report().layers)
    never, cache = run(model, "freekv:dense=0,read=160,turn=-1")
    assert far(never, wanted) > 0
    # Of the first step there is no query before.
    assert all(layer.reads.turned == 4 for layer in cache.report().layers)


@pytest.mark.parametrize(
    "recipe", [*SOME, "keyformer:budget=0.6+leoam", "leoam+quant", "quest:cells=0"]
)
def test_saved_forked_and_selected_caches_go_on_alike(recipe: str, tmp_path: Path) -> None:
    model = tiered.model()
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache(max_new_tokens=64)
        found = tiered.feed(model, cache, helpers.prompt(2, TOKENS), [TOKENS])
        found += tiered.decode(model, cache, found[-1], 3)
        cache.save(tmp_path / "cache")
        fork = cache.fork()
        loaded = engine.load_cache(tmp_path / "cache")
        wanted = tiered.decode(model, cache, found[-1], 5)
        for other in (fork, loaded):
            assert far(tiered.decode(model, other, found[-1], 5), wanted) == 0
        picked = cache.fork()
        picked.batch_select_indices(torch.tensor([1]))
        more = tiered.decode(model, cache, wanted[-1], 3)
        alone = tiered.decode(model, picked, wanted[-1][1:], 3)
        # Models give other bits in other batches, and packed slots turn bits into steps.
        least = 1e-4 if "quant" not in recipe else 0.05
        assert far(alone, [x[1:] for x in more]) < least


def sets(cache: Any, index: int) -> set[int]:
    """The numbers on the shelf of the pages that the last step of a layer chose."""
    state = cache.states[index]
    found, chosen = state.reads.last[1], set()
    for own in found.chosen:
        row, entry = (own.place_rW >= 0).nonzero().unbind(1)
        page = own.part.paging.table.pages_RW[row, own.place_rW[row, entry].long()].long()
        chosen |= set(own.part.paging.pages("ref")[page].tolist())
    return chosen


@pytest.mark.parametrize("way", tiered.LOWER)
def test_what_is_loaded_is_what_was_not_there(way: str, tmp_path: Path) -> None:
    model, recipe = tiered.model(), "quest:dense=0,read=160"
    caps = tiered.caps(way, model, recipe, 2, tmp_path)
    caps["device"] = caps["device"] * 6 // 5  # room for the last selections, and for little else
    with tiered.attached(model, recipe, caps) as engine:
        cache = engine.new_cache(max_new_tokens=64)
        logits = tiered.feed(model, cache, helpers.prompt(2, 1500), [1500])[-1]
        tiers = engine.spec.tiers
        loaded, last = 0, [set[int]() for _ in cache.states]
        for step in range(12):
            before = [part_at(state) for state in cache.states]
            count = tiers.uses.brought
            logits = tiered.decode(model, cache, logits, 1)[-1]
            now = [sets(cache, i) for i in range(len(cache.states))]
            missing = [chosen - here for chosen, here in zip(now, before, strict=True)]
            assert tiers.uses.brought - count == sum(map(len, missing))
            if step:  # the last selection has stayed: what is loaded is at most the difference
                for own, chosen, old in zip(missing, now, last, strict=True):
                    assert own <= chosen - old
            loaded += tiers.uses.brought - count
            last = now
        assert loaded
        tiered.check(engine, cache)


def test_bytes_beside_are_right_whenever_room_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe, made = tiered.model(), "leoam:read=0.3", [0]
    make = Tiers.make_space

    def make_space(self: Tiers, room: int, arena: Any, first: Any) -> int:
        made[0] += 1
        for reader in self.readers:
            known = reader.bytes_beside(anew=False)
            assert known == reader.bytes_beside(anew=True)
            reader._beside = known
        return make(self, room, arena, first)

    monkeypatch.setattr(Tiers, "make_space", make_space)
    caps = tiered.caps("both", model, recipe, 2, tmp_path)
    with tiered.attached(model, recipe, caps) as engine:
        cache = engine.new_cache(max_new_tokens=150)
        for chunk in (900, 200):  # steps, then a part of a prompt, then steps
            logits = tiered.feed(model, cache, helpers.prompt(2, chunk), [chunk])[-1]
            tiered.decode(model, cache, logits, 70)
        cache.reorder_cache(torch.tensor([1, 0]))
        tiered.decode(model, cache, logits, 2)
    assert made[0] > 100


def part_at(state: Any) -> set[int]:
    """The numbers of the pages of a layer that are on the device."""
    (part,) = state.store.aging.parts
    at_P = part.shelf.directory.at_P
    return {i for i in part.ids_in_use().tolist() if at_P[i] != NOWHERE}


def test_a_long_answer_is_retrieved_like_the_prompt_within_constant_bytes(tmp_path: Path) -> None:
    model = tiered.model(max_position_embeddings=4096, num_hidden_layers=2)
    recipe = "quest:dense=0,read=256"
    with tiered.attached(
        model, recipe, {"device": "1MiB", "host": "2MiB", "disk": f"16MiB:{tmp_path}"}
    ) as engine:
        cache = engine.new_cache(max_new_tokens=2000)
        logits = tiered.feed(model, cache, helpers.prompt(1, 1000), [1000])[-1]
        tiers, held, read = engine.spec.tiers, [], set[int]()
        for _ in range(20):
            logits = tiered.decode(model, cache, logits, 100)[-1]
            held.append(sum(tiers.device_bytes))
            state = cache.states[1]
            position = state.store.dense(POSITION).flatten(0, 1)
            read |= set(position[read_of(state.reads.last[1], state) & (position >= 0)].tolist())
        assert max(held) <= 2**20
        assert (
            len({p // 32 for p in read if p >= 1000}) > len({p // 32 for p in read if p < 1000}) / 2
        )
        assert cache.report().layers[0].slots_kept == [[3000, 3000]]
        tiered.check(engine, cache)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("quest:read=64MiB", "read=67108864B: allowed are a fraction"),
        ("quest:read=0.5prompt", "allowed are a fraction"),
        ("leoam:page=48", "multiples of 32"),
        ("quest:mass=0.1,top=8", "exclude each other"),
        ("quest:cells=3", "2 and 4 bits a channel of keys"),
        ("quest:cells=-2", "2 and 4 bits a channel of keys"),
        ("quest:candidates=all", "must be int or none"),
        ("d2o+quest", "never written again"),
        ("quest+leoam", "both replace the stage 'retrieve'"),
    ],
)
def test_what_cannot_be_is_refused(recipe: str, message: str) -> None:
    with pytest.raises((PolicyError, BudgetError), match=message):
        kvpress.attach(tiered.model(), recipe)


@pytest.mark.parametrize("recipe", ["quest:read=240,dense=0", "leoam:read=0.5"])
@pytest.mark.parametrize("width", [8, 31, 40])
def test_a_row_chooses_alike_however_its_prompt_came(recipe: str, width: int) -> None:
    model = tiered.model()
    ids = helpers.prompt(2, 500)
    own = ids[1:, 500 - 437 :]
    mask = torch.ones_like(ids)
    mask[1, : 500 - 437] = 0
    with kvpress.attach(model, recipe + ",sink=0,recent=0") as engine:
        found = []
        for given in ({"input_ids": own}, {"input_ids": ids, "attention_mask": mask}):
            for chunk in (None, width):
                made = engine.generate(
                    **given,
                    prefill_chunk_size=chunk,
                    max_new_tokens=6,
                    min_new_tokens=6,
                    do_sample=False,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                found.append([x[-1:] for x in made.logits])
    for other in found[1:]:
        assert far(other, found[0]) < 1e-3


@pytest.mark.parametrize("tokens", [5, 40, 100])
@pytest.mark.parametrize("recipe", ["quest:dense=0,read=200", "freekv:dense=0,read=200,turn=-1"])
def test_what_was_cropped_is_forgotten(recipe: str, tokens: int) -> None:
    model = tiered.model()
    with kvpress.attach(model, recipe + ",recent=0,sink=0") as engine:
        runs = []
        for more in (0, tokens):
            cache = engine.new_cache(max_new_tokens=200)
            logits = tiered.feed(model, cache, helpers.prompt(1, 500), [500])[-1]
            if more:
                tiered.decode(model, cache, logits, more)
                cache.crop(-more)
            runs.append(tiered.decode(model, cache, logits, 4))
    assert far(*runs) < 1e-4


def test_a_certificate_is_of_the_query_that_attends() -> None:
    _, cache = run(tiered.model(), "freekv:dense=0,read=96,turn=-1,sink=0,recent=0")
    state = layer_of(cache)
    torch.manual_seed(3)
    for scale in (0.2, 2.0, 20.0):
        query = torch.randn(2, 4, 32) * scale
        _, found = attend(state, query)
        weights, _, _ = exact(state, query)
        read = read_of(found, state).view(2, 2, 1, -1).expand(-1, -1, 2, -1).flatten(1, 2)
        missed = weights.masked_fill(read, 0).sum(-1)
        assert bool((found.error_bN + 1e-6 >= missed).all())


def test_top_reads_first_and_last_tokens_too_and_certifies_nothing() -> None:
    model = tiered.model()
    few, _ = run(model, "quest:dense=0,top=1,sink=0,recent=0")
    more, cache = run(model, "quest:dense=0,top=1,sink=40,recent=200")
    assert far(few, more) > 0
    report = cache.report()
    assert all(layer.reads.missed_max is None for layer in report.layers)
    json.dumps(report.to_dict(), allow_nan=False)


def test_positions_in_channels_are_refused() -> None:
    with pytest.raises(PolicyError, match="ALiBi"):
        kvpress.attach(helpers.tiny("bloom"), "quest")
