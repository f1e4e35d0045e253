"""Attaching and detaching: nothing patched, nothing leaked, everything wrong refused by name."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from typing import Any

import helpers
import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, StaticCache, pipeline

import kvpress
from kvpress.errors import (
    AttachError,
    BudgetError,
    CacheError,
    KVPressError,
    MaskError,
    PolicyError,
    UnsupportedModelError,
)

RECIPE = "keyformer:budget=0.5"


def snapshot(model: Any) -> dict[str, Any]:
    """Every attribute of the model, its modules and its config, by name."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules", "config"):
                found[f"{name}.{key}"] = copy.copy(value) if isinstance(value, dict) else value
    found["config"] = copy.deepcopy(vars(model.config))
    found["generation"] = copy.deepcopy(vars(model.generation_config))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_after_detach_the_model_is_as_before(family: str) -> None:
    model = helpers.tiny(family)
    ids = helpers.prompt(1, 30)
    model.generate(ids, max_new_tokens=2, do_sample=False)  # what transformers itself leaves behind
    before = snapshot(model)
    with kvpress.attach(model, RECIPE) as engine:
        model.generate(ids, max_new_tokens=4, do_sample=False)
        assert engine.attached
        assert snapshot(model) != before
    assert snapshot(model) == before
    assert not engine.attached
    engine.detach()
    assert engine.report().tokens_seen == [33]  # the last cache stays readable


def test_nothing_is_patched_at_import() -> None:
    code = (
        "from transformers import AttentionInterface as A, AttentionMaskInterface as M\n"
        "import transformers.models.llama.modeling_llama as m\n"
        "state = lambda: (dict(A._global_mapping), dict(M._global_mapping), dict(vars(m)))\n"
        "before = state()\n"
        "import warnings; warnings.simplefilter('error')\n"
        "import kvpress, kvpress.engine, kvpress.cli\n"
        "assert state() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_ways_in_give_the_same() -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 40)
    arguments = {"max_new_tokens": 10, "do_sample": False}
    with kvpress.attach(model, "h2o:budget=0.5") as engine:
        first = engine.generate(ids, **arguments)
        assert torch.equal(model.generate(ids, **arguments), first)
        cache = engine.new_cache()
        assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), first)
        assert cache.report().slots_kept == [[[24] * 2] * 2] * 3  # half of the 49 tokens seen
        assert engine.cache is cache
        manual = helpers.greedy(model, ids, torch.ones_like(ids), 10, engine.new_cache())
        assert torch.equal(manual, first[:, 40:])
        own = DynamicCache(config=model.config)
        assert model(ids, past_key_values=own).past_key_values is engine.cache is own
    assert torch.equal(model.generate(ids, **arguments)[:, :41], first[:, :41])


def test_a_forward_pass_returns_the_engine_cache_and_continues_from_it() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 30)
    with kvpress.attach(model, "tova:budget=0.5") as engine:
        out = model(ids)  # with gradients enabled, as a notebook user does
        assert out.past_key_values is engine.cache
        model(ids[:, :1], past_key_values=out.past_key_values)
        assert model.model(ids).past_key_values is engine.cache  # the base model is covered too
        assert model(ids, use_cache=False).past_key_values is None
        assert model(inputs_embeds=model.model.embed_tokens(ids)).past_key_values is engine.cache
        assert model(ids, None, None, engine.new_cache()).past_key_values is engine.cache


def test_a_text_generation_pipeline_uses_the_engine(demo: tuple) -> None:
    model, tokenizer = demo
    with kvpress.attach(model, "streaming_llm:budget=0.5") as engine:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
        text = generator("The capital of France is", max_new_tokens=4, do_sample=False)
        assert text[0]["generated_text"].startswith("The capital of France is")
        assert engine.report().policy.startswith("streaming_llm")


def test_two_threads_and_two_models_share_nothing() -> None:
    ids = [helpers.prompt(1, 50, seed) for seed in range(4)]
    model, other = helpers.tiny(), helpers.tiny("qwen2")
    results: dict[int, torch.Tensor] = {}
    with kvpress.attach(model, RECIPE) as first, kvpress.attach(other, "h2o") as second:
        engines = [first, first, second, second]
        expected = [
            engine.generate(x, max_new_tokens=20, do_sample=False)
            for engine, x in zip(engines, ids, strict=True)
        ]

        def work(index: int) -> None:
            engine = engines[index]
            results[index] = engine.generate(ids[index], max_new_tokens=20, do_sample=False)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[i], expected[i]) for i in range(4))


def test_horizon_is_taken_from_the_call_or_said_to_be_unknown() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 30)
    arguments = {"max_new_tokens": 5, "do_sample": False}
    ways = [
        ((ids,), arguments),
        ((ids,), {"max_length": 35, "do_sample": False}),
        ((ids, GenerationConfig(**arguments)), {}),
        ((), {"inputs": ids, "generation_config": GenerationConfig(**arguments)}),
    ]
    with kvpress.attach(model, RECIPE) as engine:
        for generate in (engine.generate, model.generate):
            for args, kwargs in ways:
                generate(*args, **kwargs)
                assert engine.cache.states[0].context.horizon == 5
                assert not any("horizon" in note for note in engine.report().notes)
        model(ids)
        assert any("horizon of 256" in note for note in engine.report(engine.new_cache()).notes)
    with kvpress.attach(model, RECIPE + ",horizon=7") as engine:
        model.generate(ids, max_new_tokens=5, do_sample=False)
        assert not any("horizon" in note for note in engine.report().notes)


# ---- refused when attaching, with nothing left behind


def unsupported() -> list[Any]:
    return [
        pytest.param(
            lambda: helpers.tiny(
                "qwen2", layer_types=["full_attention", "indexed_attention", "conv"]
            ),
            "layer 1 of type 'indexed_attention'",
            id="indexed-attention",
        ),
        pytest.param(
            lambda: helpers.tiny("mistral", sliding_window=1),
            "sliding_window=1",
            id="window-of-one",
        ),
        pytest.param(
            lambda: helpers.tiny("gemma", use_bidirectional_attention=True),
            "bidirectional attention",
            id="bidirectional",
        ),
        pytest.param(lambda: helpers.tiny().double(), "torch.float64", id="dtype"),
        pytest.param(lambda: torch.nn.Linear(2, 2), "takes a transformers model", id="no-model"),
    ]


@pytest.mark.parametrize(("make", "message"), unsupported())
def test_unsupported_models_are_refused_by_name(make: Any, message: str) -> None:
    try:
        model = make()
    except KeyError:
        pytest.skip("this transformers validates layer types itself")
    before = snapshot(model) if hasattr(model, "config") else None
    with pytest.raises(AttachError, match=message):
        kvpress.attach(model, RECIPE)
    assert before is None or snapshot(model) == before


def test_a_second_attach_is_refused_and_the_first_stays() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 30)
    with kvpress.attach(model, RECIPE) as engine:
        with pytest.raises(AttachError, match=r"already attached.*Detach it first"):
            kvpress.attach(model, "full")
        engine.generate(ids, max_new_tokens=2, do_sample=False)
    with kvpress.attach(model, "full"):
        pass


@pytest.mark.parametrize(
    ("recipe", "page_size", "error"),
    [("nothing", 16, PolicyError), ("h2o:budget=0", 16, BudgetError), ("full", 0, PolicyError)],
)
def test_wrong_options_leave_the_model_untouched(recipe: str, page_size: int, error: Any) -> None:
    model = helpers.tiny()
    before = snapshot(model)
    with pytest.raises(error):
        kvpress.attach(model, recipe, page_size=page_size)
    assert snapshot(model) == before


# ---- refused while running


def test_a_mask_of_the_wrong_length_is_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 20)
    with kvpress.attach(model, RECIPE) as engine:
        with pytest.raises(MaskError, match=r"\(2, 19\).*need \(2, 20\)"):
            model(ids, attention_mask=torch.ones(2, 19))
        cache = model(ids).past_key_values
        with pytest.raises(MaskError, match="20 cached"):
            model(ids[:, :1], attention_mask=torch.ones(2, 11), past_key_values=cache)
        assert engine.attached


def test_a_mask_that_denies_stored_tokens_is_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, RECIPE):
        cache = model(ids).past_key_values
        mask = torch.ones(1, 25)
        mask[0, :3] = 0
        with pytest.raises(MaskError, match=r"marks \[17\].*has seen \[20\]"):
            model(ids[:, :5], attention_mask=mask, past_key_values=cache)


def test_custom_masks_and_attention_outputs_are_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, RECIPE):
        with pytest.raises(MaskError, match="custom 4-D masks"):
            model(ids, attention_mask=torch.zeros(1, 1, 20, 20))
        with pytest.raises((KVPressError, ValueError), match="output_attentions"):
            model(ids, output_attentions=True)
        packed = torch.cat([torch.arange(10), torch.arange(10)])[None]
        with pytest.raises(MaskError, match="packed sequences"):
            model(ids, position_ids=packed, use_cache=False)


def test_dropout_while_training_is_refused() -> None:
    model = helpers.tiny(attention_dropout=0.1).train()
    with (
        kvpress.attach(model, RECIPE),
        pytest.raises(UnsupportedModelError, match=r"dropout=0.1.*model.eval\(\)"),
    ):
        model(helpers.prompt(1, 20))


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 2}, {"kv_heads": 3}, {"head_dim": 32}])
def test_a_cache_of_another_model_is_refused(fields: dict[str, Any]) -> None:
    model, other, ids = helpers.tiny(), helpers.tiny(**fields), helpers.prompt(1, 20)
    with (
        kvpress.attach(model, RECIPE) as engine,
        kvpress.attach(other, RECIPE),
        pytest.raises(CacheError, match="was made for llama with 3 layers"),
    ):
        other(ids, past_key_values=engine.new_cache())


def test_a_cache_of_another_batch_is_refused() -> None:
    model = helpers.tiny()
    with kvpress.attach(model, RECIPE):
        cache = model(helpers.prompt(2, 20)).past_key_values
        with pytest.raises(CacheError, match="this cache holds"):
            model(helpers.prompt(3, 1), past_key_values=cache)


def test_foreign_caches_are_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    full = model(ids).past_key_values
    with kvpress.attach(model, RECIPE):
        with pytest.raises(CacheError, match="DynamicCache of 20 tokens"):
            model(ids[:, :1], past_key_values=full)
        with pytest.raises(CacheError, match="StaticCache"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))


def test_a_cache_without_its_engine_is_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, RECIPE) as engine:
        cache = engine.new_cache()
    with pytest.raises(CacheError, match="not attached to this model"):
        model(ids, past_key_values=cache)
    with pytest.raises(AttachError, match="detached"):
        engine.generate(ids)


def test_a_report_before_the_first_call_is_refused() -> None:
    with (
        kvpress.attach(helpers.tiny(), "full") as engine,
        pytest.raises(AttachError, match="No cache yet"),
    ):
        engine.report()


def test_a_byte_budget_too_small_for_a_page_is_refused_and_loses_nothing() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 30)
    with kvpress.attach(model, "h2o:budget=2KiB") as engine:
        with pytest.raises(BudgetError, match=r"page\(s\) of 16 slots.*Raise the budget"):
            engine.generate(ids, max_new_tokens=2)
        assert engine.cache.get_seq_length() == 0
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 32)


@pytest.mark.parametrize("wrong", [(), [], "cache"])
def test_what_is_no_cache_is_refused(wrong: Any) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, "full") as engine:
        with pytest.raises(CacheError, match=f"past_key_values is a {type(wrong).__name__}"):
            model(ids, past_key_values=wrong)
        with pytest.raises(CacheError, match=r"made by engine\.new_cache"):
            engine.generate(ids, past_key_values=wrong)


def test_a_model_that_splits_its_attention_is_refused() -> None:
    config = transformers.DiffLlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.DiffLlamaForCausalLM(config).eval()
    with kvpress.attach(model, "full"), pytest.raises(CacheError, match="with other values"):
        model(helpers.prompt(1, 20))


def test_a_window_that_the_config_does_not_explain_is_refused() -> None:
    model, ids = helpers.tiny("mistral-sliding"), helpers.prompt(1, 20)
    with kvpress.attach(model, "full"):
        model.config.sliding_window = 5  # as a model whose attention is not what its config says
        with pytest.raises(UnsupportedModelError, match="attends with sliding_window=5"):
            model(ids)


def test_a_cache_is_refused_once_its_engine_is_detached_even_in_a_one_layer_model() -> None:
    model, ids = helpers.tiny(num_hidden_layers=1), helpers.prompt(1, 20)
    with kvpress.attach(model, "full"):
        cache = model(ids).past_key_values
    with pytest.raises(CacheError, match="not attached to this model any more"):
        model(ids[:, :1], past_key_values=cache)


def test_an_interrupted_forward_pass_is_noticed() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        handle.remove()
        with pytest.raises(CacheError, match=r"seen \[0, 20\] tokens: a forward pass was"):
            model(ids, past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)


def test_a_mask_that_changes_the_past_in_a_decode_step_is_refused() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20)
    with kvpress.attach(model, "full"):
        cache = model(ids).past_key_values
        mask = torch.ones(1, 21)
        mask[0, 3] = 0
        with pytest.raises(MaskError, match=r"marks \[19\]"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_a_crop_that_one_layer_refuses_changes_no_layer() -> None:
    model = helpers.tiny("gemma3")
    with kvpress.attach(model, "full") as engine:
        model(helpers.prompt(1, 20))
        with pytest.raises(CacheError, match="evicted tokens at 20"):
            engine.cache.crop(-3)
        assert [state.columns_seen for state in engine.cache.states] == [20] * 3


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_by_its_new_and_its_old_name(name: str) -> None:
    """transformers 5.24 renamed the argument."""
    model, ids = helpers.tiny(), helpers.prompt(1, 12)
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        model(ids, **{name: cache})
        assert cache.get_seq_length() == 12
        engine.generate(ids.repeat(1, 2), **{name: cache}, max_new_tokens=2)
        assert cache.get_seq_length() == 25 and engine.cache is cache
