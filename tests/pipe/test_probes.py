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
from kvpress.errors import CacheError, MaskError, PolicyError
from kvpress.hf.masks import counts_places
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
    alone: bool = option(False, "each chunk attends to itself and the sinks")
    relative: bool = option(False, "attention relative to hidden states")
    rank = "mass"

    @property
    def texts(self) -> Sequence[str]:
        return (self.words,)

    def probes(self, text: Text) -> Sequence[Probe]:
        end = len(text.ids)
        return [
            Probe((*text.texts[0], *text.ids[i:j]), i, j, self.alone)
            for i in range(text.first, end, self.chunk)
            for j in [min(end, i + self.chunk)]
        ]

    def observe(self, step: Step) -> Observation:
        return Observation(kind="max", relative=self.relative)

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
def test_a_probe_alone_attends_to_sinks_its_own_tokens_and_itself() -> None:
    """As if the text were the sinks and the chunk, where keys do not turn by position."""
    model, ids = helpers.sharp("bloom", attn_implementation="eager"), helpers.prompt(1, TOKENS)
    with kvpress.attach(model, Again(budget=1.0, chunk=24, alone=True)) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
    found = [mass[:, :24] for mass in masses(cache)]
    with kvpress.attach(model, Again(budget=1.0, chunk=24)) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
    assert not torch.allclose(found[-1], masses(cache)[-1][:, :24], atol=1e-3)
    assert torch.allclose(found[0], masses(cache)[0][:, :24], atol=1e-5)  # before any attention


@torch.no_grad()
def test_a_probe_alone_of_all_is_a_probe_and_a_padded_row_is_the_row_alone() -> None:
    model, (ids, mask) = helpers.sharp("llama"), helpers.padded([33, 21], "left")
    rows = []
    place = (mask.cumsum(1) - 1).clamp_min(0)
    given = {"attention_mask": mask, "position_ids": place}
    for alone in (False, True):
        with kvpress.attach(model, Again(budget=1.0, chunk=64, alone=alone)) as engine:
            cache = engine.new_cache()
            model(ids, past_key_values=cache, **given)
            rows.append([masses(cache, b)[2] for b in range(2)])
    for whole, near in zip(*rows, strict=True):
        torch.testing.assert_close(whole, near, atol=1e-6, rtol=1e-5)
    with kvpress.attach(model, Again(budget=0.5, chunk=12, alone=True)) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache, **given)
        for b in range(2):
            single = engine.new_cache()
            model(ids[b : b + 1][mask[b : b + 1].bool()][None], past_key_values=single)
            assert helpers.positions(single) == helpers.positions(cache, b)


@torch.no_grad()
def test_positions_that_count_padding_are_refused() -> None:
    """A probe behind them would stand elsewhere than behind the last token."""
    ids, mask = helpers.padded([33, 21], "left")
    place = (mask.cumsum(1) - 1).clamp_min(0)
    for policy in (Again(), "d2o:budget=0.5,merge_keys=unrotated", "expected_attention"):
        model = helpers.sharp("llama")
        with kvpress.attach(model, policy) as engine:
            cache = engine.new_cache()
            if not counts_places(engine.recipe):
                model(ids, attention_mask=mask, past_key_values=cache)  # differences are all
                continue
            for wrong in (None, place + 3, torch.arange(33).expand(2, -1)):
                with pytest.raises(MaskError, match="cumsum"):
                    model(ids, attention_mask=mask, position_ids=wrong, past_key_values=cache)
            with pytest.raises(MaskError, match="cumsum"):
                model(ids, position_ids=place[:1] + 3, past_key_values=cache)
            assert cache.get_seq_length() == 0
            model(ids, attention_mask=mask, position_ids=place, past_key_values=cache)
            mask, place = (
                torch.cat([mask, torch.ones(2, 5).long()], 1),
                place[:, -1:] + torch.arange(1, 6),
            )
            with pytest.raises(MaskError, match="cumsum"):
                model(ids[:, :5], attention_mask=mask, past_key_values=cache)
            model(ids[:, :5], attention_mask=mask, position_ids=place, past_key_values=cache)
            mask, place = mask[:, :33], (mask[:, :33].cumsum(1) - 1).clamp_min(0)
    with kvpress.attach(helpers.sharp("bloom"), Again()) as engine:  # counts by the mask
        engine.model(ids, attention_mask=mask, past_key_values=engine.new_cache())


@torch.no_grad()
def test_attention_relative_to_hidden_states_is_that_of_the_dense_formula() -> None:
    model, ids = helpers.sharp("llama", attn_implementation="eager"), helpers.prompt(2, TOKENS)
    hidden = relative(model, ids[:1])
    with kvpress.attach(model, Again(budget=1.0, chunk=64, relative=True)) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        assert not cache.context.norms
    for found, right in zip(masses(cache), hidden, strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(model.lm_head)
    with pytest.raises(kvpress.UnsupportedModelError, match=r"layers \[1\]"):
        kvpress.attach(model, Again(relative=True))


def relative(model: Any, ids: Tensor) -> list[Tensor]:
    """What each layer's largest attention adds to hidden states of a repetition: `[H, T]`."""
    tokens, inputs = ids.shape[1], {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: inputs.__setitem__(i, kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for i, layer in enumerate(model.model.layers)
    ]
    out = model(torch.cat([ids, ids], dim=1), output_attentions=True)
    for hook in hooks:
        hook.remove()
    found = []
    for i, weights in enumerate(out.attentions):
        own, hidden = model.model.layers[i].self_attn, inputs[i]
        groups = own.num_key_value_groups
        value = (
            own.v_proj(hidden)[0, :tokens]
            .view(tokens, -1, own.head_dim)
            .repeat_interleave(groups, 1)
        )
        turned = own.o_proj.weight.view(-1, value.shape[1], own.head_dim)
        norm = torch.einsum("tnd,cnd->ntc", value, turned).norm(dim=-1)
        part = weights[0, :, tokens:, :tokens] / hidden[0, tokens:].norm(dim=-1)[:, None]
        found.append((part.amax(1) * norm).view(-1, groups, tokens).amax(1))
    return found


@dataclass(frozen=True, kw_only=True)
class Relative(Policy):
    def observe(self, step: Step) -> Observation:
        return Observation(relative=True)


def test_relative_attention_is_refused_of_prompts() -> None:
    with pytest.raises(PolicyError, match="probes"):
        kvpress.attach(helpers.tiny(), Relative())


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
        return Merging(1.0, 0.0, 0.0)
