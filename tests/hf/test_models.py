"""Every model family: the same output as transformers and exact bytes, or a refusal by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import families
import helpers
import pytest
import torch
import transformers
from kvpress.bench.docs.marks import fill
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

import kvpress
from kvpress.errors import KVPressError, UnsupportedModelError

PAGE = 16
OF_OTHER_KINDS = [
    *("jamba", "zamba2", "qwen3_next", "qwen3_5", "lfm2", "nemotron_h", "olmo_hybrid"),
    *("kimi_linear", "deepseek_v2", "deepseek_v3", "minicpm3", "mistral4", "glm4_moe_lite"),
    *("gpt_oss", "mimo_v2_flash", "granite_swa", "gemma3n", "gemma4-wide", "llama4"),
]


# ---- families that work; test_full.py has their tokens and logits without padding


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_a_left_padded_batch_equals_transformers(family: str) -> None:
    model, (ids, mask) = families.tiny(family), helpers.padded([41, 30], "left")
    position = (mask.cumsum(1) - 1).clamp_min(0)
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        tokens = model.generate(ids, **arguments)
        logits = model(ids, attention_mask=mask, position_ids=position).logits
        with kvpress.attach(model, "full"):
            assert torch.equal(model.generate(ids, **arguments), tokens)
            given = model(ids, attention_mask=mask, position_ids=position).logits
    real = mask.bool()
    torch.testing.assert_close(given[real], logits[real], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_a_right_padded_prompt_has_the_logits_of_transformers(family: str) -> None:
    model, (ids, mask) = families.tiny(family), helpers.padded([41, 30], "right")
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        expected = model(ids, **given).logits
        with kvpress.attach(model, "full"):
            ours = model(ids, **given).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", [x for x in OF_OTHER_KINDS if x in families.FAMILIES])
def test_beams_and_files_of_layers_of_other_kinds(family: str, tmp_path: Path) -> None:
    model, (ids, mask) = families.tiny(family), helpers.padded([25, 18], "left")
    beams = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **beams)
    more, place = helpers.prompt(2, 5, seed=7), torch.arange(35)[None]
    with torch.no_grad(), kvpress.attach(model, "full") as engine:
        assert torch.equal(model.generate(ids, **beams), expected)
        cache = engine.new_cache()
        model(helpers.prompt(2, 30), past_key_values=cache, position_ids=place[:, :30])
        cache.save(tmp_path / "cache")
        again = engine.load_cache(tmp_path / "cache")
        both = [
            model(more, past_key_values=x, position_ids=place[:, 30:]).logits
            for x in (cache, again)
        ]
    assert torch.equal(*both)


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_sequences_that_end_early_take_no_slots(family: str) -> None:
    model, (ids, mask) = families.tiny(family), helpers.padded([20, 11, 15], "left")
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    endless = model.generate(ids, **arguments)[:, 20:]
    ends = [int(endless[1, 3])]  # of the second sequence, and of whoever says it too
    expected = model.generate(ids, eos_token_id=ends, **arguments)
    with kvpress.attach(model, "full") as engine:
        assert torch.equal(model.generate(ids, eos_token_id=ends, **arguments), expected)
        cache, report = engine.cache, engine.report()
        seen = cache.get_seq_length()
        ended = torch.isin(expected[:, 20:seen], torch.tensor(ends)).int()
        real = mask.sum(1) + (ended.cumsum(1) - ended == 0).sum(1)
        assert report.tokens_seen == real.tolist()
        assert cache.ids.columns == seen and cache.check_integrity()
        assert torch.equal(cache.ids.real().sum(1), real)


@pytest.mark.parametrize("family", list(families.FAMILIES))
@pytest.mark.parametrize("recipe", ["snapkv:budget=0.5,window=8", "keyformer:budget=0.5"])
def test_a_policy_holds_exactly_the_bytes_of_half_the_tokens(recipe: str, family: str) -> None:
    """Counted from transformers' own cache: 35 of 70 tokens, or the window, in whole pages."""
    model, ids = families.tiny(family), helpers.prompt(2, 70)
    own = DynamicCache(config=model.config)
    with torch.no_grad(), kvpress.attach(model, recipe) as engine:
        model(ids)
        report, states = engine.report(), engine.cache.states
        engine.detach()
        model(ids, past_key_values=own)
    for layer, state in zip(report.layers, states, strict=True):
        full = own.layers[layer.index]
        heads, bias = state.kind.heads, state.kind.slopes is not None
        copies = full.keys.shape[1] // heads  # transformers repeats KV heads of a new Falcon
        keys, values = full.keys[:, ::copies], full.values[:, ::copies]
        slots = 35 if state.kind.window is None else min(70, state.kind.window - 1)
        assert layer.slots_kept == [[slots] * heads] * 2
        assert layer.bytes_full == keys.nbytes + values.nbytes
        slot_bytes = (keys.nbytes + values.nbytes) // keys[..., 0].numel()
        slot_bytes += state.kind.latent * keys.itemsize  # a latent is key and value, apart
        extra = 4 + 4 * state.recipe.accumulates  # its position and its mass
        extra += 2 * 4 * bias  # its position in two channels of the key
        pages = -(-slots // PAGE)
        row_bytes = pages * (PAGE * (slot_bytes + extra) + 4) + 2 * 8  # + table entries, counters
        assert layer.bytes_held == 2 * heads * row_bytes
        assert layer.bytes_held == helpers.live_storages(state.store)


def test_layers_with_heads_of_their_own_are_read_from_their_configs() -> None:
    if "gemma4" not in families.FAMILIES:
        pytest.skip("this transformers has no Gemma 4")
    with kvpress.attach(families.tiny("gemma4"), "full") as engine:
        assert [kind.heads for kind in engine.spec.fingerprint.kinds] == [2, 2, 1]
        assert [kind.window for kind in engine.spec.fingerprint.kinds] == [9, 9, None]


# ---- families that are refused


@pytest.mark.parametrize("family", list(families.REFUSED))
def test_a_refusal_says_what_is_given_what_is_allowed_and_what_to_do(family: str) -> None:
    with torch.device("meta"):
        model = families.tiny(family)
    before = copy.deepcopy(vars(model.config))
    with pytest.raises(UnsupportedModelError, match=r"^The model '\w+' has .* Allowed: ") as caught:
        kvpress.attach(model, "keyformer:budget=0.5")
    assert caught.value.reason in str(caught.value)
    assert vars(model.config) == before and not model._forward_hooks


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "no layer with attention"),
        ("rwkv", "no cache of transformers"),
        ("recurrent_gemma", "no cache of transformers"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("gpt_neo", "bypasses transformers' attention interface"),
        ("inkling2", "sinks that follow from the hidden state"),
        ("bert", "bidirectional attention"),
    ],
)
def test_the_reason_names_the_kind_of_attention(family: str, reason: str) -> None:
    if family not in families.REFUSED:
        pytest.skip("this transformers has no such family")
    assert reason in families.described(family)[1]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("JetMoe", {"kv_channels": 16, "num_local_experts": 4}, "did not reach the engine's"),
        ("Doge", {}, "not plain causal|custom 4-D masks"),
        ("Phimoe", {"sliding_window": 9, "num_local_experts": 4}, "attends with sliding_window="),
    ],
)
def test_what_shows_only_while_running_is_refused_then(
    name: str, fields: dict[str, Any], message: str
) -> None:
    common = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**(common | heads | fields))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with kvpress.attach(model, "full"), pytest.raises(KVPressError, match=message):
        model(helpers.prompt(1, 20))


@pytest.mark.parametrize("option", ["s_aux", "sinks", "indices", "block_indices", "position_bias"])
def test_options_that_nobody_honours_are_refused(option: str) -> None:
    """An argument that reaches the attention function and is ignored would be a wrong result."""
    model, ids = families.tiny(), helpers.prompt(1, 20)
    with (
        kvpress.attach(model, "full"),
        pytest.raises(UnsupportedModelError, match=f"asks for {option}"),
    ):
        model(ids, **{option: torch.zeros(6)})


def test_the_table_of_models_is_what_the_engine_says() -> None:
    if families.MISSING:
        pytest.skip(f"this transformers has no {', '.join(families.MISSING)}")
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert fill(page, {"models": families.markdown}, check=True), "run scripts/lint"
    working, every = families.counts()
    readme = (page.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{working} of {every} tested\narchitectures" in readme
    assert working >= 0.9 * every


# ---- models that are spread, offloaded or quantised

RECIPES = ["full", "keyformer:budget=0.5"]
ARGUMENTS = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_dispatched_model_gives_the_same_tokens(family: str, recipe: str) -> None:
    """Every module then has hooks that move what comes in to where its weights are."""
    model, ids = families.tiny(family), helpers.prompt(2, 40)
    with kvpress.attach(model, recipe) as engine:
        expected = engine.generate(ids, **ARGUMENTS)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert model.hf_device_map == {"": "cpu"}
    with kvpress.attach(model, recipe) as engine:
        assert torch.equal(engine.generate(ids, **ARGUMENTS), expected)
        assert torch.equal(model.generate(ids, **ARGUMENTS), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_device_map_with_layers_on_disk_changes_no_token(recipe: str, tmp_path: Path) -> None:
    model, ids = families.tiny(), helpers.prompt(2, 40)
    with kvpress.attach(model, recipe) as engine:
        expected = engine.generate(ids, **ARGUMENTS)
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    places |= {"model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    mapped = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights"
    )
    assert mapped.model.layers[2].mlp.up_proj.weight.device.type == "meta"
    with kvpress.attach(mapped, recipe) as engine:
        assert torch.equal(engine.generate(ids, **ARGUMENTS), expected)


@pytest.mark.filterwarnings("ignore:You are calling .generate.*")  # of older transformers
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_change_no_token(where: str, recipe: str, tmp_path: Path) -> None:
    """accelerate brings the weights of a module when it runs, and takes them away again."""
    model, ids = families.tiny(), helpers.prompt(2, 40)
    with kvpress.attach(model, recipe) as engine:
        expected = engine.generate(ids, **ARGUMENTS)
        held = engine.report().bytes_held
    if where == "cpu":
        accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert all(p.device.type == "meta" for p in model.parameters())
    with kvpress.attach(model, recipe) as engine:
        assert torch.equal(engine.generate(ids, **ARGUMENTS), expected)
        assert engine.report().bytes_held == held


def quantised(how: str, folder: Path) -> Any:
    """A tiny model with quantised weights; skips where the package for that is not installed."""
    model = families.tiny(query_heads=4, intermediate_size=128)
    if how == "torchao-int8":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model
    pytest.importorskip("bitsandbytes")
    model.save_pretrained(folder)
    bits = {"load_in_8bit": how.endswith("int8"), "load_in_4bit": how.endswith("nf4")}
    config = BitsAndBytesConfig(**bits, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize("how", ["torchao-int8", "bitsandbytes-int8", "bitsandbytes-nf4"])
def test_quantised_weights_give_the_tokens_of_transformers(how: str, tmp_path: Path) -> None:
    """Keys and values stay in the dtype that the model computes in, and so does the cache."""
    model, ids = quantised(how, tmp_path), helpers.prompt(2, 40)
    assert model.model.layers[0].mlp.up_proj.weight.__class__ is not torch.nn.Parameter
    expected = model.generate(ids, **ARGUMENTS)
    with kvpress.attach(model, "full") as engine:
        assert torch.equal(engine.generate(ids, **ARGUMENTS), expected)
    with kvpress.attach(model, "keyformer:budget=0.5") as engine:
        engine.generate(ids, **ARGUMENTS)
        report = engine.report()
    assert {n for layer in report.slots_kept for rows in layer for n in rows} == {25}  # of 51
    assert engine.cache.states[0].token_dtype == model.dtype
