"""Samples, beams and chat turns are what each sequence would get by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import helpers
import pytest
import torch
from transformers import DynamicCache

import kvpress

# Not knorm: the keys of a token that is said twice tie in the first layer, and rounding decides.
RECIPES = [
    "full",
    "snapkv:budget=0.5,window=8",
    "streaming_llm:budget=0.5",
    "keyformer:budget=0.5",
    "h2o:budget=0.5",
    "tova:budget=0.5",
    "random:budget=0.5",
]
LENGTHS = [26, 17]  # of the prompts of a batch, padded on the left
NEW = 12
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def sharp(family: str = "llama") -> Any:
    """A random model whose next token depends on what it attends to."""
    return helpers.tiny(family, initializer_range=0.3, tie_word_embeddings=False)


@torch.no_grad()
def follow(model: Any, cache: Any, chunks: list[torch.Tensor]) -> torch.Tensor:
    """The logits after every chunk that is fed to one sequence: `[chunks, vocabulary]`."""
    logits = [model(chunk[None], past_key_values=cache).logits[0, -1] for chunk in chunks]
    return torch.stack(logits)


def alone(model: Any, engine: Any, prompt: torch.Tensor, tokens: torch.Tensor) -> Any:
    """Logits for each of the tokens of one sequence by itself, and its cache."""
    cache = engine.new_cache(max_new_tokens=NEW)
    return follow(model, cache, [prompt, *tokens[:-1].split(1)]), cache


def generate(engine: Any, **arguments: Any) -> tuple[Any, list[torch.Tensor]]:
    """The output of `generate()` for a padded batch, and the prompts without their padding."""
    ids, mask = helpers.padded(LENGTHS, "left")
    out = engine.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **arguments,
    )
    return out, [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_sample_equals_the_sequence_alone(recipe: str, family: str) -> None:
    model = sharp(family)
    with kvpress.attach(model, recipe) as engine:
        out, prompts = generate(engine, do_sample=True, num_return_sequences=3, temperature=2.0)
        cache = out.past_key_values
        given = torch.stack(out.logits, dim=1)
        assert len({tuple(row.tolist()) for row in out.sequences}) == len(given) == 6
        for row, sequence in enumerate(out.sequences):
            tokens = sequence[max(LENGTHS) :]
            logits, own = alone(model, engine, prompts[row // 3], tokens)
            torch.testing.assert_close(given[row], logits, **CLOSE)
            assert helpers.positions(cache, row) == helpers.positions(own), f"row {row}"


def hypothesis(sequence: torch.Tensor, end: int | None) -> torch.Tensor:
    """The tokens of a hypothesis after its prompt, its end included, its padding not."""
    tokens = sequence[max(LENGTHS) :]
    ends = (tokens == end).nonzero().flatten().tolist() if end is not None else []
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_beam_has_the_probability_of_the_sequence_alone(recipe: str, ends: bool) -> None:
    model, penalty = sharp(), 0.7
    beams = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": penalty}
    with kvpress.attach(model, recipe) as engine:
        end = None
        if ends:  # at a token that a hypothesis would have gone on from
            end = int(generate(engine, **beams)[0].sequences[0, max(LENGTHS) + 5])
        out, prompts = generate(engine, **beams, eos_token_id=end, pad_token_id=0)
        steps = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
        lengths = set()
        for row, sequence in enumerate(out.sequences):
            tokens = hypothesis(sequence, end)
            logits, _ = alone(model, engine, prompts[row // 3], tokens)
            expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(steps[row, : len(tokens)], expected, **CLOSE)
            score = expected.sum() / len(tokens) ** penalty
            torch.testing.assert_close(out.sequences_scores[row], score, **CLOSE)
            lengths.add(len(tokens))
        assert (min(lengths) < NEW) == ends


@pytest.mark.parametrize("recipe", ["full", "keyformer:budget=0.5", "snapkv:budget=0.5,window=8"])
def test_every_sampled_beam_has_the_probability_of_the_sequence_alone(recipe: str) -> None:
    model = sharp("gemma3")
    with kvpress.attach(model, recipe) as engine:
        out, prompts = generate(engine, num_beams=3, do_sample=True, num_return_sequences=3)
        for row, sequence in enumerate(out.sequences):
            tokens = hypothesis(sequence, None)
            logits, _ = alone(model, engine, prompts[row // 3], tokens)
            expected = logits.log_softmax(-1).gather(1, tokens[:, None]).mean()
            torch.testing.assert_close(out.sequences_scores[row], expected, **CLOSE)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How many tokens every forward pass is fed."""
    fed: list[int] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: fed.append(args[0].shape[1])
    )
    yield fed
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("recipe", ["full", "snapkv:budget=0.5,window=8", "keyformer:budget=0.5"])
def test_a_chat_turn_feeds_the_new_tokens_to_an_uninterrupted_cache(
    recipe: str, family: str
) -> None:
    model, first, second = sharp(family), helpers.prompt(1, 20), helpers.prompt(1, 9, seed=5)
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    with kvpress.attach(model, recipe) as engine, counted(model) as fed:
        cache = engine.new_cache()
        answer = engine.generate(first, past_key_values=cache, **options)
        chat = torch.cat([answer.sequences, second], dim=1)
        reply = engine.generate(chat, past_key_values=cache, **options)
        assert fed == [20, *[1] * 5, 1 + 9, *[1] * 5]  # the last token of an answer is not fed yet
        chunks = list(reply.sequences[0, :-1].split(fed))
        whole = engine.new_cache(max_new_tokens=6)
        if recipe != "full":
            expected = follow(model, whole, chunks)
            assert helpers.positions(cache) == helpers.positions(whole)
    if recipe == "full":
        expected = follow(model, DynamicCache(config=model.config), chunks)
    given = torch.cat([*answer.logits, *reply.logits])
    torch.testing.assert_close(given, expected, **CLOSE)


@pytest.mark.parametrize("recipe", ["full", "h2o:budget=0.5"])
def test_a_chat_turn_of_a_padded_batch_feeds_only_what_is_new(recipe: str) -> None:
    model, (ids, mask) = sharp(), helpers.padded(LENGTHS, "left")
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    with kvpress.attach(model, recipe) as engine, counted(model) as fed:
        cache = engine.new_cache()
        answer = engine.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        chat = torch.cat([answer.sequences, helpers.prompt(2, 9, seed=5)], dim=1)
        whole = torch.cat([mask, torch.ones(2, 15, dtype=mask.dtype)], dim=1)
        reply = engine.generate(chat, attention_mask=whole, past_key_values=cache, **options)
        assert fed == [26, *[1] * 5, 1 + 9, *[1] * 5]
        given = torch.stack([*answer.logits, *reply.logits], dim=1)
        for row, length in enumerate(LENGTHS):
            tokens = reply.sequences[row, max(LENGTHS) - length : -1]
            own = engine.new_cache(max_new_tokens=6)
            expected = follow(model, own, list(tokens.split([length, *fed[1:12]])))
            torch.testing.assert_close(given[row], expected, **CLOSE)
            assert helpers.positions(cache, row) == helpers.positions(own)
