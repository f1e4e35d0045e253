"""Models with images: the engine finds their text model; what images do to masks is honoured."""

from __future__ import annotations

from typing import Any

import helpers
import pytest
import torch
import transformers

import kvpress
from kvpress.errors import MaskError

TEXT = {
    "num_hidden_layers": 3,
    "vocab_size": helpers.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
VISION = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "image_size": 28,
    "num_attention_heads": 2,
    "patch_size": 14,
}
IMAGE = 95
ARGUMENTS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def llava() -> Any:
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    mixed = {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    config = transformers.Gemma3Config(
        text_config=TEXT | mixed,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=94,
        eoi_token_index=93,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_5() -> Any:
    linear = {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = transformers.Qwen3_5Config(
        text_config=TEXT | linear, vision_config=vision | {"out_hidden_size": 64}
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


MAKERS = {"llava": llava, "gemma3": gemma3, "qwen3_5": qwen3_5}


def tiny(name: str) -> Any:
    if name == "qwen3_5" and not hasattr(transformers, "Qwen3_5Config"):
        pytest.skip("this transformers has no Qwen 3.5")
    torch.manual_seed(0)
    return MAKERS[name]().eval()


@pytest.mark.parametrize("name", list(MAKERS))
def test_text_alone_equals_transformers(name: str) -> None:
    model, (ids, mask) = tiny(name), helpers.padded([21, 14], "left")
    ids = ids.clamp_max(90)
    expected, before = model.generate(ids, attention_mask=mask, **ARGUMENTS), str(model.config)
    with kvpress.attach(model, "full") as engine:
        assert torch.equal(model.generate(ids, attention_mask=mask, **ARGUMENTS), expected)
        cache = engine.cache
        assert not bool((cache.ids.all() == -1).any())  # ids are known, through all models
        more = torch.cat([expected, ids[:, :3]], 1)
        longer = torch.nn.functional.pad(mask, (0, more.shape[1] - mask.shape[1]), value=1)
        given = engine.generate(more, attention_mask=longer, cache=cache, **ARGUMENTS)
    assert str(model.config) == before
    assert torch.equal(given, model.generate(more, attention_mask=longer, **ARGUMENTS))


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_policy_compresses_the_text_model(name: str) -> None:
    model, ids = tiny(name), helpers.prompt(2, 40).clamp_max(90)
    with kvpress.attach(model, "keyformer:budget=0.5") as engine:
        model.generate(ids, **ARGUMENTS)
        for layer, state in zip(engine.report().layers, engine.cache.states, strict=True):
            kept = 23 if state.kind.window is None else state.kind.window - 1
            assert layer.slots_kept == [[kept] * 2] * 2


def test_image_tokens_are_tokens() -> None:
    model, ids = tiny("llava"), helpers.prompt(2, 12).clamp_max(90)
    image = torch.full((2, 4), IMAGE)  # patches of a picture
    ids = torch.cat([ids[:, :3], image, ids[:, 3:]], 1)
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    given = {"pixel_values": pixels, "attention_mask": torch.ones_like(ids), **ARGUMENTS}
    expected = model.generate(ids, **given)
    assert not torch.equal(expected, model.generate(ids, **given | {"pixel_values": 9 * pixels}))
    with kvpress.attach(model, "full") as engine:
        assert torch.equal(model.generate(ids, **given), expected)
        assert engine.report().tokens_seen == [23, 23]
    with kvpress.attach(model, "snapkv:budget=8,window=4") as engine:
        model.generate(ids, **given)
        assert engine.report().slots_kept[0] == [[8 + 7] * 2] * 2


def test_masks_in_both_directions_are_refused() -> None:
    """Image tokens of Gemma 3 see each other, later ones as well."""
    model, ids = tiny("gemma3"), helpers.prompt(1, 12).clamp_max(90)
    ids = torch.cat([ids[:, :3], torch.full((1, 4), IMAGE), ids[:, 3:]], 1)
    given = {"pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (ids == IMAGE).long()}
    refused = pytest.raises(MaskError, match="not plain causal")
    with torch.no_grad(), kvpress.attach(model, "full"), refused:
        model(ids, **given)
