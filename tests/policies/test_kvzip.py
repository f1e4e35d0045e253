"""KVzip: what it reads behind a text, which scores it keeps, and what survives."""

from __future__ import annotations

import helpers
import pytest
import torch

import kvpress
from kvpress import ops
from kvpress.formulas.structure import structural
from kvpress.formulas.sums import over_group
from kvpress.ops import Logits, Noise, Reduction
from kvpress.policy import Slots, Text
from kvpress.policy.loading import load_policy


def text(tokens: int, first: int = 0, room: int = 2**31) -> Text:
    return Text(list(range(tokens)), first, ((-1, -2), (-3,)), room)


def test_chunks_begin_with_the_instruction_and_the_cue_of_the_chunk_before() -> None:
    policy = load_policy("kvzip", chunk=40, cue=3)
    first, second, third = policy.probes(text(100))
    assert [(p.first, p.last) for p in (first, second, third)] == [(0, 40), (40, 80), (80, 100)]
    assert list(first.ids) == [-1, -2, *range(40)]
    assert list(second.ids) == [-3, 37, 38, 39, *range(40, 80)]
    assert list(third.ids) == [-3, 77, 78, 79, *range(80, 100)]


def test_a_short_tail_joins_the_chunk_before_and_chunks_fit_the_positions_left() -> None:
    policy = load_policy("kvzip", chunk=40, cue=3)
    assert [(p.first, p.last) for p in policy.probes(text(89))] == [(0, 40), (40, 89)]
    assert [(p.first, p.last) for p in policy.probes(text(30, first=10))] == [(10, 30)]
    assert policy.probes(text(30, first=30)) == []  # all of it is protected
    for room in (20, 44, 47, 60):
        probes = policy.probes(text(89, room=room))
        assert all(len(p.ids) <= room for p in probes)
        assert [p.first for p in probes[1:]] == [p.last for p in probes[:-1]]
        assert (probes[0].first, probes[-1].last) == (0, 89)


def test_the_worked_example_of_the_specification() -> None:
    """Columns: a sink, c1 and c2, and the two tokens that repeat them."""
    # Keys are unit vectors, so that a query is the row of its logits.
    logits = torch.tensor(
        [[[1.0, 2, 0, 0, 0], [0, 0, 3, 1, 0]], [[2, 0, 1, 0, 0], [1, 1, 0, 0, 2]]]
    )
    key, position = torch.eye(5)[None, None], torch.arange(5).expand(1, 1, 5)
    found = ops.attention_sums(
        logits[None], key, position, Logits(1.0, 0.0), Reduction(2, True), Noise("none", 1.0, 0, 0)
    )
    score = over_group(found, 1, "max")[0, 0, 1:3]
    torch.testing.assert_close(score, torch.tensor([0.61030, 0.77839]), atol=1e-5, rtol=0)


def test_normalised_attention_is_that_of_the_worked_example() -> None:
    """The same with |h| = 2, 4 and |W v| = 1, 3 of the first head and 2, 1 of the second."""
    logits = torch.tensor(
        [[[1.0, 2, 0, 0, 0], [0, 0, 3, 1, 0]], [[2, 0, 1, 0, 0], [1, 1, 0, 0, 2]]]
    )
    key, position = torch.eye(5)[None, None], torch.arange(5).expand(1, 1, 5)
    hidden = torch.tensor([[2.0, 4.0]])
    reduction = Reduction(2, True, 1 / hidden)
    found = ops.attention_sums(
        logits[None], key, position, Logits(1.0, 0.0), reduction, Noise("none", 1.0, 0, 0)
    )
    norm = torch.tensor([[1.0, 3], [2, 1]])
    score = over_group(found[:, :, 1:3] * norm, 1, "max")[0, 0]
    torch.testing.assert_close(score, torch.tensor([0.30515, 0.58380]), atol=1e-5, rtol=0)


def test_structure_is_demoted_where_it_is_asked_for() -> None:
    words = ["a", ",", " b", ",", " c"]
    shown = Text([0, 1, 2, 1, 3], 0, ((), ()), 2**31, lambda: words)
    (plain,) = load_policy("kvzip").probes(shown)
    (demoted,) = load_policy("kvzip", structure=0.25, repeats=2).probes(shown)
    assert plain.factors is None and demoted.factors == [1.0, 0.25, 1.0, 0.25, 1.0]
    assert load_policy("kvzip").needs == frozenset()
    with pytest.raises(LookupError, match="words"):
        load_policy("kvzip", structure=0.25).probes(text(40))


@torch.no_grad()
def test_structure_needs_a_tokenizer_that_writes_its_tokens() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 60)
    spec = "kvzip:budget=1.0,instruction=,further=,repeats=1,structure="
    kept = []
    with pytest.raises(kvpress.PolicyError, match="tokenizer"):
        kvpress.attach(model, spec + "0.5")
    for structure in (1.0, 0.5):
        with kvpress.attach(model, f"{spec}{structure}", tokenizer=helpers.characters()) as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            words = cache.spec.wording.words(ids[0].tolist()) if structure < 1 else []
            kept.append(cache.states[0].rows.dense_by_position([0])["mass"][0])
    factor = torch.tensor(structural(words, 1, 0.5))
    assert 0.5 in factor and 1.0 in factor
    torch.testing.assert_close(kept[1], kept[0] * factor)


def test_the_largest_attention_of_all_looks_is_kept() -> None:
    shape = (1, 1, 3)
    slots = Slots(
        layer=0,
        position_BHS=torch.arange(3).view(shape),
        seen_B=torch.tensor([3]),
        new_tokens=1,
        fetch=lambda name: torch.zeros(*shape, 4),
        attention_BHS=torch.tensor([0.2, 0.0, 0.7]).view(shape),
        mass_BHS=torch.tensor([0.1, 0.5, 0.0]).view(shape),
    )
    kept = load_policy("kvzip").accumulate(slots)
    assert kept.flatten().tolist() == pytest.approx([0.2, 0.5, 0.7])


@torch.no_grad()
def test_rows_compete_in_the_model_the_layer_or_not_at_all() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 60)
    kept = {}
    for scope in ("model", "layer", "row"):
        spec = f"kvzip:budget=0.25,instruction=,further=,scope={scope}"
        with kvpress.attach(model, spec) as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache)
            kept[scope] = [layer[0] for layer in cache.report().slots_kept]
    assert kept["row"] == [[15, 15]] * 3
    assert all(sum(layer) == 30 for layer in kept["layer"]) and kept["layer"] != kept["row"]
    assert sum(map(sum, kept["model"])) == 90 and kept["model"] != kept["layer"]


@pytest.mark.real_model
@torch.no_grad()
def test_a_code_in_a_long_filler_survives_sixteen_to_one() -> None:
    from kvpress.bench.common.demo import demo_folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_folder())
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    filler = "The grass is green. The sky is blue. The sun is warm. Here we go. There and back. "
    needle = "The secret number of the harbour is 58213. "
    context = tokenizer(filler * 12 + needle + filler * 12, return_tensors="pt")["input_ids"]
    start = len(tokenizer(filler * 12)["input_ids"])
    code = {start + i for i in range(len(tokenizer(needle)["input_ids"]))}
    kept = {}
    for name in ("kvzip", "snapkv"):
        with kvpress.attach(model, f"{name}:budget=0.0625") as engine:
            cache = engine.new_cache()
            model(context, past_key_values=cache)
            rows = [set(row) for layer in helpers.positions(cache) for row in layer]
            kept[name] = sum(len(row & code) for row in rows) / sum(map(len, rows))
    assert kept["kvzip"] > 3 * kept["snapkv"]
