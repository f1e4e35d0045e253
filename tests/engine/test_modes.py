"""`full` gives transformers' own tokens in every way of generating."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import helpers
import pytest
import torch
from helpers import characters, sharp
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import kvpress

FAMILIES = ["llama", "gemma3"]  # full attention only; sliding and full layers
NEW = 14

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    "samples": {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.6},
    "beam-sampling": {"num_beams": 3, "do_sample": True, "temperature": 1.5},
    "processors": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "chunked-prompt": {"prefill_chunk_size": 7},
    "no-cache": {"use_cache": False},
}

EOS_MODES = {
    "greedy": {},
    "samples": {"do_sample": True, "top_k": 4, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.2},
    "beams-early": {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True},
}

SPECULATIVE = {
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "prompt-lookup-sampling": {"prompt_lookup_num_tokens": 3, "do_sample": True, "top_k": 3},
    "assisted": {"assistant": True},
    "assisted-sampling": {"assistant": True, "do_sample": True, "top_k": 3},
}


def batch(padding: str) -> dict[str, torch.Tensor]:
    """Two prompts, of one length or padded on the left."""
    ids, mask = helpers.padded([23, 23] if padding == "none" else [23, 9], "left")
    return {"input_ids": ids, "attention_mask": mask}


def both(model: Any, call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call gives with the engine attached, and without, from the same seed."""
    with kvpress.attach(model, "full"):
        torch.manual_seed(3)
        given = call()
    torch.manual_seed(3)
    return given, call()


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gets_the_tokens_of_transformers(family: str, mode: str, padding: str) -> None:
    model = sharp(family)
    arguments = batch(padding) | {"max_new_tokens": NEW} | MODES[mode]
    given, expected = both(model, lambda: model.generate(**arguments))
    assert torch.equal(given, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_would_differ_if_the_cache_were_wrong(family: str) -> None:
    """Without this the tests above could pass whatever the cache returns."""
    model = sharp(family)
    arguments = batch("none") | {"max_new_tokens": NEW}
    expected = model.generate(**arguments)
    with kvpress.attach(model, "streaming_llm:budget=0.5"):
        assert not torch.equal(model.generate(**arguments), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("mode", list(EOS_MODES))
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_stop_at_their_own_end(family: str, mode: str, padding: str) -> None:
    model = sharp(family)
    arguments = batch(padding) | {"max_new_tokens": NEW, "pad_token_id": 0} | EOS_MODES[mode]
    torch.manual_seed(3)
    endless = model.generate(**arguments)[:, 23:]
    ends = [int(endless[0, 4]), int(endless[-1, 7])]
    given, expected = both(model, lambda: model.generate(**arguments, eos_token_id=ends))
    assert torch.equal(given, expected)
    assert bool(torch.isin(given[:, 23:], torch.tensor(ends)).any())
    assert not torch.equal(given[:, 23:], endless)


@pytest.mark.parametrize("mode", list(SPECULATIVE))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_speculative_decoding_gets_the_tokens_of_transformers(family: str, mode: str) -> None:
    model, ids = sharp(family), helpers.prompt(1, 9).repeat(1, 3)
    arguments = {"max_new_tokens": NEW} | SPECULATIVE[mode]
    if arguments.pop("assistant", False):
        arguments["assistant_model"] = sharp("llama", num_hidden_layers=1)
    given, expected = both(model, lambda: model.generate(ids, **arguments))
    assert torch.equal(given, expected)
    if not arguments.get("do_sample"):
        assert torch.equal(given, model.generate(ids, max_new_tokens=NEW))


def test_an_assistant_may_have_an_engine_of_its_own() -> None:
    model, assistant = sharp("llama"), sharp("llama", num_hidden_layers=1)
    arguments = {"assistant_model": assistant, "max_new_tokens": NEW}
    ids = helpers.prompt(1, 21)
    with kvpress.attach(assistant, "full"):
        given, expected = both(model, lambda: model.generate(ids, **arguments))
    assert torch.equal(given, expected)


@torch.no_grad()
def contrast(model: Any, inputs: dict[str, torch.Tensor], cache: Any, width: int = 4) -> Any:
    """A loop of the caller's own: of the likeliest tokens, the one most unlike what was said.

    Every candidate is fed to a copy of its sequence's cache; the copies not chosen are dropped.
    """
    mask, position = inputs["attention_mask"], inputs["attention_mask"].cumsum(1) - 1
    options = {"output_hidden_states": True, "use_cache": True, "past_key_values": cache}
    out = model(**inputs, position_ids=position.clamp_min(0), **options)
    rows, tokens = torch.arange(len(mask)), []
    said, logits, seen = out.hidden_states[-1], out.logits[:, -1], mask.sum(1, keepdim=True)
    options["past_key_values"] = cache = out.past_key_values
    for _ in range(NEW):
        chance, candidate = logits.softmax(-1).topk(width)
        mask = torch.cat([mask, torch.ones_like(seen)], dim=1)
        cache.batch_repeat_interleave(width)
        out = model(
            candidate.view(-1, 1),
            attention_mask=mask.repeat_interleave(width, 0),
            position_ids=seen.repeat_interleave(width, 0),
            **options,
        )
        hidden = out.hidden_states[-1].view(len(rows), width, -1)
        likeness = torch.cosine_similarity(hidden[:, :, None], said[:, None], dim=-1).amax(-1)
        best = (chance - likeness).argmax(-1)
        cache.batch_select_indices(rows * width + best)
        said = torch.cat([said, hidden[rows, best][:, None]], dim=1)
        logits = out.logits.view(len(rows), width, -1)[rows, best]
        tokens.append(candidate[rows, best])
        seen = seen + 1
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_that_repeats_and_picks_sequences_gets_the_same(family: str, padding: str) -> None:
    model, inputs = sharp(family), batch(padding)
    expected = contrast(model, inputs, DynamicCache(config=model.config))
    with kvpress.attach(model, "full") as engine:
        assert torch.equal(contrast(model, inputs, None), expected)
        assert torch.equal(contrast(model, inputs, engine.new_cache()), expected)
    greedy = model.generate(**inputs, max_new_tokens=NEW)[:, -NEW:]
    assert not torch.equal(expected, greedy)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_custom_generate_function_gets_the_same(family: str) -> None:
    model, inputs = sharp(family), batch("left")

    def loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        mask = kwargs["attention_mask"]
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        return helpers.greedy(model, input_ids, mask, NEW, cache)

    def call() -> torch.Tensor:
        return model.generate(**inputs, custom_generate=loop, max_new_tokens=NEW)

    expected = call()
    with kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        given = model.generate(
            **inputs, custom_generate=loop, max_new_tokens=NEW, past_key_values=cache
        )
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + NEW - 1
    assert torch.equal(given, expected)


class Listener(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamer_hears_the_tokens_of_transformers(family: str, mode: str) -> None:
    model, ids = sharp(family), helpers.prompt(1, 21)

    def call() -> Listener:
        listener = Listener()
        out = model.generate(ids, streamer=listener, max_new_tokens=NEW, **MODES[mode])
        assert listener.ended and listener.heard == out[0].tolist()
        return listener

    given, expected = both(model, call)
    assert given.heard == expected.heard


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_strings_stop_where_transformers_stops(family: str) -> None:
    model, tokenizer = sharp(family), characters()
    arguments = batch("left") | {"max_new_tokens": NEW}
    texts = tokenizer.batch_decode(model.generate(**arguments)[:, -NEW:])
    arguments |= {"stop_strings": [text[4:6] for text in texts], "tokenizer": tokenizer}
    given, expected = both(model, lambda: model.generate(**arguments, pad_token_id=0))
    assert torch.equal(given, expected)
    assert given.shape[1] < 23 + NEW


class Alternate(LogitsProcessor):
    """Even tokens at even lengths, odd ones at odd lengths."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        parity = torch.arange(scores.shape[-1]) % 2
        return scores.masked_fill(parity != input_ids.shape[1] % 2, -torch.inf)


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_logits_processor_sees_what_it_sees_in_transformers(family: str, mode: str) -> None:
    model = sharp(family)
    arguments = batch("left") | {"max_new_tokens": NEW} | MODES[mode]
    processors = LogitsProcessorList([Alternate()])
    given, expected = both(model, lambda: model.generate(**arguments, logits_processor=processors))
    assert torch.equal(given, expected)
    assert bool((given[:, 23:] % 2 == torch.arange(23, 23 + NEW) % 2).all())


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_on_an_attached_model_writes_the_same_text(family: str, mode: str) -> None:
    model, texts = sharp(family), ["The capital of France is", "1 + 1 ="]
    write = pipeline("text-generation", model=model, tokenizer=characters(), batch_size=2)
    given, expected = both(model, lambda: write(texts, max_new_tokens=NEW, **MODES[mode]))
    assert given == expected
    assert given[0][0]["generated_text"].startswith(texts[0])
