"""What users do around `generate()` and caches: a right answer, or an error that helps."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import helpers
import pytest
import torch
from helpers import characters, sharp
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    pipeline,
)

import kvpress
from kvpress.errors import AttachError, CacheError, InputError, KVPressError, MaskError

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
POLICIES = ["full", "keyformer:budget=0.3", "snapkv:budget=0.3,window=8", "quant"]


# ---- a cache of the caller that is filled in place


@torch.no_grad()
def test_a_dynamic_cache_is_filled_in_place_and_so_are_its_copies() -> None:
    model, ids = sharp("llama"), helpers.prompt(1, 40)
    right = model(ids).logits[:, 30:]
    with kvpress.attach(model, "full"):
        own = DynamicCache(config=model.config)
        assert model(ids[:, :30], past_key_values=own).past_key_values is own
        assert own.get_seq_length() == 30
        for suffix in (copy.deepcopy(own), copy.deepcopy(copy.deepcopy(own)), own):
            logits = model(ids[:, 30:], past_key_values=suffix).logits
            torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)
    with pytest.raises(CacheError, match="not attached to this model any more"):
        model(ids[:, :1], past_key_values=own)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_filled_cache_answers_several_questions(policy: str) -> None:
    model, ids = sharp("llama"), helpers.prompt(1, 40)
    with kvpress.attach(model, policy) as engine, torch.no_grad():
        own = DynamicCache()
        model(ids, past_key_values=own)
        forked = engine.new_cache()
        model(ids, past_key_values=forked)
        for seed in (1, 2):
            text = torch.cat([ids, helpers.prompt(1, 5, seed)], dim=1)
            given = model.generate(text, past_key_values=copy.deepcopy(own), **GREEDY)
            assert torch.equal(given, engine.generate(text, cache=forked.fork(), **GREEDY))
            if policy == "full":
                assert torch.equal(given, engine.generate(text, **GREEDY))


def test_layers_of_a_cache_cannot_be_taken_out() -> None:
    with kvpress.attach(helpers.tiny(), "full") as engine:
        cache = engine.new_cache()
        for ask in (lambda: cache[0], lambda: list(cache), lambda: [*cache]):
            with pytest.raises(CacheError, match=r"kept_positions\(layer"):
                ask()
        assert len(cache) == 3


def test_a_cache_class_of_the_callers_own_is_refused() -> None:
    class Own(DynamicCache):
        """Might do anything."""

    model = helpers.tiny()
    with kvpress.attach(model, "full"), pytest.raises(CacheError, match="is a Own of 0 tokens"):
        model(helpers.prompt(1, 12), past_key_values=Own())


# ---- what counts as drafted


@pytest.mark.parametrize("policy", [*POLICIES, "h2o:budget=0.5", "d2o:budget=0.3"])
@torch.no_grad()
def test_a_prompt_of_which_many_logits_are_kept_is_a_prompt(policy: str) -> None:
    model, ids = sharp("llama"), helpers.prompt(1, 40)
    with kvpress.attach(model, policy):
        caches = [None, DynamicCache(config=model.config)]
        outs = [model(ids, past_key_values=cache, logits_to_keep=20) for cache in caches]
        assert torch.equal(outs[0].logits, outs[1].logits)
        one, other = (out.past_key_values for out in outs)
        assert helpers.positions(one) == helpers.positions(other)
        nexts = [model(ids[:, :1], past_key_values=cache).logits for cache in (one, other)]
        assert torch.equal(*nexts)
        assert (
            not one.states[0].context.recording.on and not other.states[0].sequences.drafts.tokens
        )


@pytest.mark.parametrize("policy", ["h2o:budget=0.5", "streaming_llm:budget=0.5"])
def test_model_generate_drafts_as_engine_generate_does(policy: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 11).repeat(1, 4)
    arguments = {**GREEDY, "prompt_lookup_num_tokens": 4}
    with kvpress.attach(model, policy) as engine:
        expected = engine.generate(ids, **arguments)
        assert torch.equal(model.generate(ids, **arguments), expected)
        assert not engine.cache.states[0].context.recording.on


# ---- the cache that a call hands over


class Rereads(LogitsProcessor):
    """Runs the model on another text at every step, as guidance and reward models do."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._model(helpers.prompt(1, 7, seed=5))
        self._model.generate(helpers.prompt(1, 6, seed=6), max_new_tokens=1)
        return scores


@pytest.mark.parametrize("way", ["engine", "model"])
@pytest.mark.parametrize("inside", ["guidance", "processor"])
def test_passes_inside_a_call_do_not_replace_its_cache(way: str, inside: str) -> None:
    model, ids = sharp("llama"), helpers.prompt(1, 40)
    with kvpress.attach(model, "full") as engine:
        extra: dict[str, Any] = {"logits_processor": [Rereads(model)]}
        if inside == "guidance":
            extra = {"guidance_scale": 1.5, "negative_prompt_ids": helpers.prompt(1, 10, seed=3)}
        out = (engine if way == "engine" else model).generate(ids, **GREEDY, **extra)
        if inside == "guidance" or way == "engine":
            assert engine.report().tokens_seen == [51]
        text = torch.cat([out, helpers.prompt(1, 9, seed=4)], dim=1)
        model(helpers.prompt(1, 7, seed=5))  # a pass that only scores a text
        given = engine.generate(text, cache=engine.cache, **GREEDY)
        assert torch.equal(given, engine.generate(text, **GREEDY))


def test_a_newer_cache_that_somebody_holds_is_shown() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, "full") as engine, torch.no_grad():
        first = model(ids).past_key_values
        assert engine.cache is first
        engine.generate(ids, **GREEDY)
        generated = engine.cache
        held = model(ids).past_key_values
        assert engine.cache is held
        del held
        assert engine.cache is generated


def test_threads_see_their_own_cache() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, "full") as engine:
        engine.generate(ids, **GREEDY)
        own, seen = engine.cache, []

        def work() -> None:
            engine.generate(helpers.prompt(1, 9), **GREEDY)
            seen.append(engine.cache)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert engine.cache is own is not seen[0]


@pytest.mark.parametrize("way", ["engine", "model"])
def test_ids_that_do_not_go_on_from_the_cache_are_refused(way: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 20)
    with kvpress.attach(model, "h2o:budget=0.5") as engine:
        generate = (engine if way == "engine" else model).generate
        out = generate(ids, past_key_values=engine.new_cache(), **GREEDY)
        cache = engine.cache
        other = torch.cat([out, helpers.prompt(2, 4)], dim=1)
        other[1, 22] = (other[1, 22] + 1) % 90 + 2
        with pytest.raises(CacheError, match=r"column 22 of sequence 1"):
            generate(other, past_key_values=cache, **GREEDY)
        with pytest.raises(CacheError, match=r"given 4 tokens, but the cache has seen 31"):
            generate(helpers.prompt(2, 4), past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == 31
        generate(torch.cat([out, helpers.prompt(2, 4)], dim=1), past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == 31 + 5 + 11


def test_ids_follow_beams_crops_forks_and_copies() -> None:
    model, ids = sharp("llama"), helpers.prompt(2, 20)
    with kvpress.attach(model, "full") as engine, torch.no_grad():
        cache = engine.new_cache()
        out = engine.generate(ids, cache=cache, num_beams=3, num_return_sequences=3, **GREEDY)
        assert cache.ids.columns == cache.get_seq_length() == out.shape[1] - 1
        ran = cache.fork()
        ran.crop(-5)
        assert ran.ids.columns == 26 and cache.ids.columns == 31
        twin = copy.deepcopy(ran)
        twin.batch_select_indices(torch.tensor([0, 3]))
        assert torch.equal(twin.ids.all(), ran.ids.all()[[0, 3]])
        assert torch.equal(twin.ids.all()[:, :20], ids.int())
        model(inputs_embeds=model.model.embed_tokens(ids[:, :3]), past_key_values=twin)
        assert twin.ids.all()[:, -3:].eq(-1).all()
        twin.reset()
        assert twin.ids.columns == 0


# ---- rows that meet their end before others


EVERY = [  # but knorm, whose ties between equal tokens are decided by rounding
    *("full", "keyformer:budget=0.3", "h2o:budget=0.4", "tova:budget=0.4", "d2o:budget=0.3"),
    *("streaming_llm:budget=0.4", "snapkv:budget=0.5,window=8", "think"),
    *("quant", "h2o:budget=0.4+quant:residual=16", "sale+keyformer:budget=0.5+think+quant"),
]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", EVERY)
def test_what_ended_rows_are_fed_occupies_nothing(policy: str, family: str) -> None:
    """Rows that ended, and those that went on beside them, are what each row alone is."""
    model, lengths = sharp(family), [80, 34, 50, 41]
    ids, mask = helpers.padded(lengths, "left", seed=50)
    ids = ids.masked_fill((ids < 2) & mask.bool(), 2)
    arguments = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    with kvpress.attach(model, policy) as engine, torch.no_grad():
        endless = model.generate(ids, attention_mask=mask, **arguments)[:, 80:]
        ends = [int(endless[1, 9]), int(endless[2, 20])]
        out = model.generate(ids, attention_mask=mask, eos_token_id=ends, **arguments)
        cache, seen = engine.cache, engine.cache.get_seq_length()
        is_end = torch.isin(out[:, 80:], torch.tensor(ends))
        real = torch.cat([mask.bool(), is_end.cumsum(1) - is_end.int() == 0], dim=1)[:, :seen]
        assert (~real[:, 80:]).any(1).sum() in (1, 2, 3)  # some rows ended early, not all
        assert engine.report().tokens_seen == real.sum(1).tolist()
        assert cache.check_integrity()
        for row, length in enumerate(lengths):
            alone = engine.new_cache(40)
            text = out[row : row + 1, :seen][:, real[row]]
            for chunk in (text[:, :length], *text[:, length:].split(1, dim=1)):
                model(chunk, past_key_values=alone)
            assert helpers.positions(alone) == helpers.positions(cache, row)


@pytest.mark.parametrize("how", ["ends", "stop-strings", "criterion", "stock-criterion"])
def test_a_second_turn_is_what_each_row_alone_would_be(how: str) -> None:
    model, lengths = sharp("llama"), [40, 17, 25]
    ids, mask = helpers.padded(lengths, "left", seed=50)
    arguments: dict[str, Any] = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    endless = model.generate(ids, attention_mask=mask, **arguments)[:, 40:]
    ends = [int(endless[1, 3]), int(endless[2, 8])]
    tokenizer = characters()

    class AfterFour(StoppingCriteria):
        """Ends the second row after four tokens, the others never."""

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([False, input_ids.shape[1] >= 44, False])

    extra: dict[str, Any] = {"eos_token_id": ends}
    if how == "stop-strings":
        text = tokenizer.decode(endless[1, 2:5])
        extra = {"stop_strings": [text], "tokenizer": tokenizer, "eos_token_id": [96]}
    if how == "criterion":
        extra = {"stopping_criteria": [AfterFour()], "eos_token_id": [96]}
    if how == "stock-criterion":
        extra = {"stopping_criteria": [EosTokenCriteria(ends)]}
    expected = model.generate(ids, attention_mask=mask, **arguments, **extra)
    with kvpress.attach(model, "full") as engine:
        out = model.generate(ids, attention_mask=mask, **arguments, **extra)
        assert torch.equal(out, expected)
        seen = engine.cache.get_seq_length()
        counts = engine.report().tokens_seen
        real = torch.arange(out.shape[1])[None] < torch.tensor(counts)[:, None] + 40 - mask.sum(
            1, keepdim=True
        )
        real[:, :40] = mask.bool()
        real[:, seen:] = (torch.tensor(counts) == mask.sum(1) + seen - 40)[:, None]
        assert (~real[:, 40:]).any()
        turn = torch.cat([out, helpers.prompt(3, 6, seed=77)], dim=1)
        told = torch.cat([real.long(), torch.ones(3, 6, dtype=torch.long)], dim=1)
        given = engine.generate(turn, attention_mask=told, cache=engine.cache, **GREEDY)
        with pytest.raises(MaskError, match="Mark padding with 0"):
            engine.generate(
                torch.cat([given, given[:, :2]], dim=1),
                attention_mask=torch.ones(3, given.shape[1] + 2, dtype=torch.long),
                cache=engine.cache,
                **GREEDY,
            )
    for row in range(3):
        alone = turn[row : row + 1][:, told[row].bool()]
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **GREEDY)
        assert torch.equal(given[row, turn.shape[1] :], expected[0, alone.shape[1] :])


def test_a_mask_of_the_same_count_elsewhere_is_refused() -> None:
    model, (ids, mask) = helpers.tiny(), helpers.padded([20, 12], "left")
    with kvpress.attach(model, "full"), torch.no_grad():
        position = (mask.cumsum(1) - 1).clamp_min(0)
        cache = model(ids, attention_mask=mask, position_ids=position).past_key_values
        wrong = torch.cat([mask.flip(1), torch.ones(2, 3, dtype=torch.long)], dim=1)
        with pytest.raises(MaskError, match="column 0 of sequence 1"):
            model(helpers.prompt(2, 3), attention_mask=wrong, past_key_values=cache)
        model(helpers.prompt(2, 3), past_key_values=cache)  # new tokens are real, positions free


# ---- options that cannot be honoured, however they are said


def refusals() -> list[Any]:
    """What is refused as a keyword, and as a switch of a config."""
    return [
        pytest.param({"output_attentions": True}, "output_attentions", id="output_attentions"),
        pytest.param({"assistant_early_exit": 2}, "assistant_early_exit", id="early-exit"),
        pytest.param({"use_cache": False}, "use_cache=False", id="use_cache"),
    ]


@pytest.mark.parametrize(("option", "message"), refusals())
@pytest.mark.parametrize("way", ["keyword", "config", "model"])
def test_an_option_is_refused_however_it_is_said(
    option: dict[str, Any], message: str, way: str
) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    before = model.generate(ids, **GREEDY)
    layers = model.config.num_hidden_layers
    with kvpress.attach(model, "h2o") as engine:
        arguments: dict[str, Any] = dict(GREEDY)
        if way == "keyword":
            arguments |= option
        elif way == "config":
            arguments = {"generation_config": GenerationConfig(**GREEDY, **option)}
        elif "use_cache" not in option:
            model.generation_config.update(**option)
        for generate in (engine.generate, model.generate):
            if way == "model" and "use_cache" in option:
                model.generation_config.use_cache = False
                generate(ids, **arguments)
                assert any("use_cache=False" in note for note in engine.report().notes)
                assert engine.report().slots_kept
                continue
            with pytest.raises((KVPressError, ValueError), match=message):
                generate(ids, **arguments)
    assert model.config.num_hidden_layers == layers
    model.generation_config = GenerationConfig()
    assert torch.equal(model.generate(ids, **GREEDY), before)


def test_attentions_asked_for_by_the_config_are_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, "full"):
        model.config._output_attentions = True  # as after eager attention, or from a checkpoint
        with pytest.raises(KVPressError, match="output_attentions"):
            model(ids)
        with pytest.raises(KVPressError, match="output_attentions"):
            model.generate(ids, **GREEDY)
    with pytest.raises(KVPressError, match="output_attentions"):
        kvpress.attach(model, "full")
    assert model.config._attn_implementation != "kvpress"


def test_plain_tuples_may_be_asked_for_by_the_config() -> None:
    model, ids = helpers.tiny().model, helpers.prompt(1, 20).repeat(2, 1)
    with torch.no_grad(), kvpress.attach(model, "full"):
        model.config.return_dict = False
        out = model(ids)
        assert isinstance(out, tuple) and out[1].get_seq_length() == 20


def test_an_attention_that_is_set_meanwhile_is_refused() -> None:
    model, ids = helpers.tiny(num_hidden_layers=1), helpers.prompt(1, 20)
    with kvpress.attach(model, "full"):
        model.set_attn_implementation("sdpa")
        with pytest.raises(AttachError, match=r"set to 'sdpa' while.*kvpress.detach"):
            model(ids)


@pytest.mark.parametrize("name", ["dynamic", "static", "offloaded", "quantized"])
def test_a_cache_implementation_of_a_checkpoint_is_stood_for(name: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    expected = model.generate(ids, **GREEDY)
    model.generation_config.cache_implementation = name
    with kvpress.attach(model, "full") as engine:
        for generate in (engine.generate, model.generate):
            assert torch.equal(generate(ids, **GREEDY), expected)
            notes = engine.report().notes
            assert any(f"cache_implementation='{name}'" in note for note in notes)
            with pytest.raises(CacheError, match=r"^cache_implementation='offloaded'"):
                generate(ids, cache_implementation="offloaded", **GREEDY)


@pytest.mark.parametrize("text", ["Hello", ["Hello", "there"]])
def test_text_instead_of_ids_is_refused(text: Any) -> None:
    model = helpers.tiny()
    with kvpress.attach(model, "full") as engine:
        for generate in (engine.generate, model.generate):
            with pytest.raises(InputError, match=r"takes token ids: tokenizer\("):
                generate(text, **GREEDY)


# ---- models as users hold them


def test_a_copy_of_an_attached_model_is_a_plain_model() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    before = model.generate(ids, **GREEDY)
    with kvpress.attach(model, "h2o:budget=0.5") as engine:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twins = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
            copy.deepcopy(torch.nn.ModuleList([model]))[0],
        ]
        compressed = engine.generate(ids, **GREEDY)
        twins.append(copy.deepcopy(model))
        for twin in twins:
            assert twin.config._attn_implementation == "sdpa"
            assert torch.equal(twin.generate(ids, **GREEDY), before)
            assert isinstance(twin(ids).past_key_values, DynamicCache)
            assert twin(ids, use_cache=False).logits.shape == (1, 20, 97)
            with kvpress.attach(twin, "full") as other:
                assert torch.equal(twin.generate(ids, **GREEDY), before)
                assert other.report().tokens_seen == [31]
            next(twin.parameters()).data.zero_()
        inner = copy.deepcopy(model.model)
        assert isinstance(inner(ids).past_key_values, DynamicCache)
        assert torch.equal(engine.generate(ids, **GREEDY), compressed)
    assert torch.equal(model.generate(ids, **GREEDY), before)
    assert not {"generate", "__deepcopy__", "__reduce_ex__"} & vars(model).keys()


def wrappers() -> list[Any]:
    def text(model: Any) -> Any:
        return pipeline("text-generation", model=model, tokenizer=characters())

    return [
        pytest.param(torch.compile, id="compiled"),
        pytest.param(torch.nn.DataParallel, id="data-parallel"),
        pytest.param(text, id="pipeline"),
    ]


@pytest.mark.parametrize("wrap", wrappers())
def test_the_model_inside_a_wrapper_is_attached_to(wrap: Any) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    wrapper = wrap(model)
    with kvpress.attach(wrapper, "h2o:budget=0.5") as engine:
        assert engine.model is model and kvpress.engine_of(wrapper) is engine
        model.generate(ids, **GREEDY)
        assert engine.report().tokens_seen == [31]
    assert kvpress.engine_of(wrapper) is None


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_adapters_are_unwrapped_and_those_that_learn_a_prompt_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    expected = adapted.generate(input_ids=ids, **GREEDY)
    with kvpress.attach(adapted, "full") as engine:
        assert torch.equal(adapted.generate(input_ids=ids, **GREEDY), expected)
        assert torch.equal(engine.generate(ids, **GREEDY), expected)
        assert engine.report().tokens_seen == [31]
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(helpers.tiny(), prompt)
    with pytest.raises(AttachError, match="PromptTuningConfig puts keys"):
        kvpress.attach(tuned, "full")


def test_an_engine_that_nobody_kept_can_be_found_and_detached() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    kvpress.attach(model, "h2o:budget=0.5")
    model.generate(ids, **GREEDY)
    assert kvpress.engine_of(model).report().tokens_seen == [31]
    with pytest.raises(AttachError, match=r"kvpress\.detach\(model\)"):
        kvpress.attach(model, "full")
    kvpress.detach(model)
    kvpress.detach(model)
    assert kvpress.engine_of(model) is None
    with kvpress.attach(model, "full") as engine:
        assert repr(engine) == "<kvpress.Engine 'full' on LlamaForCausalLM, attached>"
    assert repr(engine).endswith("detached>")


def test_another_dtype_while_attached_is_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, "h2o:budget=0.5"), torch.no_grad():
        cache = model(ids).past_key_values
        model.double()
        with pytest.raises(KVPressError, match="float64"):
            model(ids)
        with pytest.raises(KVPressError, match="float64"):
            model(ids[:, :1], past_key_values=cache)


def test_two_models_with_one_config_are_told_apart() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    other = type(model)(model.config).eval()
    with kvpress.attach(model, "full"):
        with pytest.raises(AttachError, match="shares its config object"):
            kvpress.attach(other, "full")
        with pytest.raises(KVPressError):
            other.generate(ids, **GREEDY)
    assert other.generate(ids, **GREEDY).shape == (1, 32)
