"""The second look: probes behind a prompt, what they observe, and that nothing of them stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import helpers
import pytest
import torch
from torch import Tensor

import kvpress
from kvpress.errors import CacheError, PolicyError
from kvpress.policy import Budget, Merging, Observation, Policy, Probe, Slots, Step, Text, option

TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class Again(Policy):
    """Reads the text again in chunks, and keeps what that attends to most."""

    accumulates: ClassVar[bool] = True
    budget: Budget = option(0.25, "kept")
    sink: int = option(0, "first tokens", low=0)
    recent: int = option(1, "last tokens", low=0)
    interval: int = option(0, "only prompts", low=0, high=0)
    chunk: int = option(20, "tokens at once", low=1)
    words: str = option("", "said before")
    rank = "mass"

    @property
    def texts(self) -> Sequence[str]:
        return (self.words,)

    def probes(self, text: Text) -> Sequence[Probe]:
        end = len(text.ids)
        return [
            Probe((*text.texts[0], *text.ids[i : i + self.chunk]), i, min(end, i + self.chunk))
            for i in range(text.first, end, self.chunk)
        ]

    def observe(self, step: Step) -> Observation:
        return Observation(kind="max")

    def accumulate(self, slots: Slots) -> Tensor:
        return torch.maximum(slots.kept_mass_BHS, slots.observed_BHS)


def masses(cache: Any, sequence: int = 0) -> list[Tensor]:
    return [state.rows.dense_by_position([sequence])["mass"][0] for state in cache.states]


def expected(model: Any, ids: Tensor, chunk: int, words: Sequence[int] = ()) -> list[Tensor]:
    """The largest attention to every token by the dense formula: `[H, T]` of each layer."""
    tokens = ids.shape[1]
    best = None
    for start in range(0, tokens, chunk):
        stop = min(tokens, start + chunk)
        probe = torch.tensor([[*words, *ids[0, start:stop].tolist()]])
        out = model(torch.cat([ids, probe], dim=1), output_attentions=True)
        if best is None:
            best = [torch.zeros(2, tokens) for _ in out.attentions]
        seen = torch.zeros(tokens + probe.shape[1], dtype=torch.bool)
        seen[: min(4, start)] = seen[start:stop] = seen[tokens:] = True
        for layer, weights in enumerate(out.attentions):
            # The softmax over a part of the keys: their weights, divided by their sum.
            part = weights[0, :, tokens:] * seen
            part = part / part.sum(-1, keepdim=True)
            top = part.amax(1).view(2, -1, part.shape[-1]).amax(1)
            best[layer][:, start:stop] = top[:, start:stop]
    assert best is not None
    return best


@pytest.mark.parametrize("chunk", [20, 48, 7])
@torch.no_grad()
def test_scores_are_those_of_the_dense_formula(chunk: int) -> None:
    model, ids = helpers.sharp("llama", attn_implementation="eager"), helpers.prompt(1, TOKENS)
    wanted = expected(model, ids, chunk)
    with kvpress.attach(model, Again(budget=1.0, chunk=chunk)) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
    for found, right in zip(masses(cache), wanted, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_nothing_of_a_probe_stays() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(2, TOKENS)
    logits = []
    for policy in (Again(budget=1.0), "full"):
        with kvpress.attach(model, policy) as engine:
            cache = engine.new_cache()
            logits.append([model(ids, past_key_values=cache).logits])
            for step in range(4):
                logits[-1].append(model(ids[:, step : step + 1], past_key_values=cache).logits)
            assert cache.get_seq_length() == TOKENS + 4
            assert counts(cache) == [[[TOKENS + 4] * 2] * 2] * 3
    for ours, theirs in zip(*logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def counts(cache: Any) -> list[list[list[int]]]:
    return [state.rows.counts_BH.tolist() for state in cache.states]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "opt", "bloom"])
def test_a_padded_row_is_the_row_alone(family: str, side: str) -> None:
    model, lengths, new = helpers.sharp(family), [33, 5, 21, 33], 5
    ids, mask = helpers.padded(lengths, side)
    with kvpress.attach(model, Again(budget=0.5, chunk=16)) as engine:
        cache = engine.new_cache()
        together = helpers.greedy(model, ids, mask, new, cache)
        assert cache.check_integrity()
        for b in range(len(lengths)):
            own, alone = ids[b : b + 1][mask[b : b + 1].bool()][None], engine.new_cache()
            tokens = helpers.greedy(model, own, torch.ones_like(own), new, alone)
            assert torch.equal(tokens[0], together[b])
            assert helpers.positions(alone) == helpers.positions(cache, b)


def test_generate_reads_chunks_of_a_prompt_as_one() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(2, TOKENS)
    kept, tokens = [], []
    with kvpress.attach(model, Again()) as engine:
        for options in ({}, {"prefill_chunk_size": 16}, {"num_beams": 2}):
            tokens.append(engine.generate(ids, max_new_tokens=4, do_sample=False, **options))
            kept.append([[p for p in row if p < TOKENS] for x in positions(engine) for row in x])
    assert kept[0] == kept[1] == kept[2]
    assert torch.equal(tokens[0], tokens[1])


def positions(engine: Any) -> list[list[list[int]]]:
    return helpers.positions(engine.cache)


@torch.no_grad()
def test_a_second_turn_looks_at_its_own_tokens_and_at_the_answer() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, TOKENS)
    with kvpress.attach(model, Again(budget=0.5, chunk=64)) as engine:
        cache = engine.new_cache()
        model(ids[:, :24], past_key_values=cache)
        before = dict(
            zip(helpers.positions(cache)[1][0], masses(cache)[1][0].tolist(), strict=True)
        )
        model(ids[:, 24:25], past_key_values=cache)
        model(ids[:, 25:], past_key_values=cache)
        assert sum(map(len, helpers.positions(cache)[1])) == 2 * TOKENS // 2
        after = dict(zip(helpers.positions(cache)[1][0], masses(cache)[1][0].tolist(), strict=True))
    old = [p for p in after if p < 24]
    assert old and all(after[p] == before[p] for p in old)
    assert all(after[p] > 0 for p in after if p >= 24)


@torch.no_grad()
def test_a_row_without_a_prompt_is_not_looked_at_beside_one_that_has() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(2, TOKENS)
    with kvpress.attach(model, Again(budget=0.5)) as engine:
        both, alone = engine.new_cache(), engine.new_cache()
        for cache, rows in ((both, 2), (alone, 1)):
            model(ids[:rows, :20], past_key_values=cache)
            for step in range(20, 26):
                model(ids[:rows, step : step + 1], past_key_values=cache)
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[0, 26:] = 0  # the first row has nothing to read, the second another prompt
        model(ids[:, 26:40], attention_mask=mask, past_key_values=both)
        assert helpers.positions(both) == helpers.positions(alone)
        assert sum(map(len, helpers.positions(both, 1)[0])) == 2 * 20
        assert both.check_integrity()


@torch.no_grad()
def test_half_a_look_is_none_and_the_cache_says_so() -> None:
    model, ids, passes = helpers.sharp("llama"), helpers.prompt(1, TOKENS), []

    def fail(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 2:
            raise ValueError("interrupted")

    with kvpress.attach(model, Again()) as engine:
        cache = engine.new_cache()
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="interrupted"):
            model(ids, past_key_values=cache)
        handle.remove()
        for change in (cache.fork, lambda: model(ids[:, :1], past_key_values=cache)):
            with pytest.raises(CacheError, match="interrupted"):
                change()
        cache.reset()
        model(ids, past_key_values=cache)
        assert sum(map(len, helpers.positions(cache)[0])) == 2 * TOKENS // 4


@torch.no_grad()
def test_what_pages_held_before_is_no_score_of_decoded_tokens() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, TOKENS)
    found = []
    for stale in (0.0, 9.0):
        with kvpress.attach(model, Again(budget=1.0)) as engine:
            cache = engine.new_cache()
            model(ids[:, :24], past_key_values=cache)
            model(ids[:, 24:25], past_key_values=cache)
            for state in cache.states:
                mass = state.rows.dense("mass")
                decoded = state.rows.dense("position") == 24
                state.rows.write("mass", mass.masked_fill(decoded, stale))
            model(ids[:, 25:], past_key_values=cache)
            found.append(masses(cache))
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean, other)


@torch.no_grad()
def test_forks_files_and_crops_after_the_look(tmp_path: Path) -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(2, TOKENS)
    with kvpress.attach(model, Again()) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        for other in (cache.fork(), engine.load_cache(tmp_path / "cache.safetensors")):
            first = model(ids[:, :1], past_key_values=other).logits
            other.crop(-1)
            again = model(ids[:, :1], past_key_values=other).logits
            torch.testing.assert_close(first, again, atol=1e-6, rtol=1e-5)
            assert helpers.positions(other) != helpers.positions(cache)


def test_words_need_a_tokenizer_and_are_said() -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, TOKENS)
    policy = Again(budget=1.0, chunk=64, words="say it")
    with pytest.raises(PolicyError, match="tokenizer=tokenizer"):
        kvpress.attach(model, policy)
    tokenizer = helpers.characters()
    with kvpress.attach(model, policy, tokenizer=tokenizer) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
    plain = helpers.sharp("llama", attn_implementation="eager")
    wanted = expected(plain, ids, 64, tokenizer("say it", add_special_tokens=False)["input_ids"])
    for found, right in zip(masses(cache), wanted, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_cannot_be_looked_at_again_is_refused_before_anything_changes() -> None:
    model = helpers.tiny(max_position_embeddings=128)
    ids = helpers.prompt(1, 100)
    with kvpress.attach(model, Again()) as engine:
        cache = engine.new_cache()
        embeds = model.get_input_embeddings()(ids[:, :9])
        with pytest.raises(CacheError, match="input_ids"):
            model(inputs_embeds=embeds, past_key_values=cache)
        with pytest.raises(CacheError, match="128 positions"):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 0
        model(ids[:, :40], past_key_values=cache)
        assert cache.get_seq_length() == 40
    with pytest.raises(PolicyError, match="merging"):
        kvpress.attach(model, [Again(), Merges()])


@dataclass(frozen=True, kw_only=True)
class Merges(Policy):
    def absorb(self) -> Merging:
        return Merging()
