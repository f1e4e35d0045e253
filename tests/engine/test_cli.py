"""The command line on a tiny model in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import helpers
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvpress import cli, env, ops
from kvpress.ops import build_cpu

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer that has a word for every letter."""
    where = tmp_path_factory.mktemp("model")
    helpers.tiny().save_pretrained(where)
    words = {"<pad>": 0, "<s>": 1} | {chr(33 + i): i + 2 for i in range(helpers.VOCAB - 3)}
    inner = Tokenizer(models.WordLevel(words | {"<unk>": helpers.VOCAB - 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(where)
    return where


def run(*arguments: Any) -> str:
    result = RUNNER.invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_run_compares_policies_in_a_table(folder: Path) -> None:
    out = run(
        "run", "--model", folder, "--policy", "full", "--policy", "h2o:budget=0.5",
        "--prompt", "a" * 60, "--max-new-tokens", 4, "--layers",
    )  # fmt: skip
    assert "h2o:budget=0.5" in out and "tok/s" in out and " 63 " in out


def test_run_gives_json_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abcdefghijkl\n\nabc\n")
    out = run(
        "run", "--model", folder, "--policy", "tova:budget=0.5", "--batch-file", prompts,
        "--max-new-tokens", 3, "--json", "--threads", 1,
    )  # fmt: skip
    (result,) = json.loads(out)
    assert result["prompt_tokens"] == [12, 3]
    assert result["report"]["tokens_seen"] == [14, 5]
    assert result["report"]["slots_kept"] == [[[7, 7], [2, 2]]] * 3
    assert (result["new_tokens"], len(result["texts"])) == (3, 2)
    assert result["first_token_seconds"] > 0 and result["tokens_per_second"] > 0


def test_the_default_prompt_has_the_length_asked_for(folder: Path) -> None:
    out = run("run", "--model", folder, "--prompt-tokens", 300, "--max-new-tokens", 1, "--json")
    (result,) = json.loads(out)
    assert result["prompt_tokens"] == [302]  # two characters between the text and the question
    assert result["tokens_per_second"] is None


def test_sampling_is_seeded(folder: Path) -> None:
    arguments = ["run", "--model", folder, "--prompt", "hello", "--sample", "--json", "--seed", 5]
    texts = [json.loads(run(*arguments))[0]["texts"] for _ in range(2)]
    assert texts[0] == texts[1]


def test_policies_lists_all_with_their_options() -> None:
    listed = json.loads(run("policies", "--json"))
    names = [entry["name"] for entry in listed]
    assert names == sorted(names) and {"full", "keyformer", "snapkv"} <= set(names)
    options = next(entry["options"] for entry in listed if entry["name"] == "keyformer")
    assert options["recent_ratio"][0] == "0.3"
    assert "| `keyformer` |" in run("policies", "--markdown")
    assert "keyformer" in run("policies")


def test_info_names_versions_devices_and_operators() -> None:
    facts = json.loads(run("info", "--json"))
    assert facts["versions"]["transformers"].startswith("5.")
    assert facts["operators"]["on cpu"] == ops.backends()["cpu"]
    assert facts["operators"]["instruction set"] in (
        *env.INSTRUCTION_SETS,
        "none: no C++ operator runs",
    )
    assert "decode_step" in facts["operators"]["names"]
    assert facts["devices"]["cpu"].startswith(build_cpu.processor())
    assert "devices" in run("info")


@pytest.mark.parametrize(
    ("family", "parts", "token_bytes"),
    [
        ("llama", [(0, 2, "compressed", 2, 16, 256)], 768),
        ("mistral-sliding", [(0, 2, "keeps its window", 2, 16, 256)], 0),
        (
            "jamba",
            [
                (0, 0, "keeps its state as it is", 0, 0, 0),
                (1, 1, "compressed", 2, 16, 256),
                (2, 2, "keeps its state as it is", 0, 0, 0),
            ],
            256,
        ),
        ("deepseek_v3", [(0, 2, "compressed", 1, 24, 96)], 288),
    ],
)
def test_info_says_what_happens_to_a_model_by_its_config(
    family: str, parts: list[tuple[Any, ...]], token_bytes: int, tmp_path: Path
) -> None:
    with torch.device("meta"):
        families.tiny(family).config.save_pretrained(tmp_path)
    found = json.loads(run("info", "--model", str(tmp_path), "--json"))
    assert [tuple(part.values()) for part in found["parts"]] == parts
    assert found["token_bytes"] == token_bytes and not found["refused"]
    assert "what happens" in run("info", "--model", str(tmp_path))


def test_info_says_why_a_model_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        families.tiny("mamba").config.save_pretrained(tmp_path)
    assert "is refused: no layer with attention" in run("info", "--model", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "keyfomer"], "Did you mean 'keyformer'"),
        (["--model", "/no/such/folder"], "cannot be loaded"),
        (["--dtype", "int8"], "Allowed: auto, float32, float16, bfloat16"),
        (["--prompt", ""], "There is no prompt"),
        (["--prompt-file", "/no/such/file"], "cannot be read as text"),
        (["--prompt", "x" * 1020, "--max-new-tokens", "9"], "exceed the model's 1024 positions"),
    ],
)
def test_engine_errors_are_one_message_and_status_2(
    folder: Path, arguments: list[str], message: str, monkeypatch: Any, capsys: Any
) -> None:
    if "--model" not in arguments:
        arguments = ["--model", str(folder), *arguments]
    monkeypatch.setattr("sys.argv", ["kvpress", "run", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "a", "--prompt-file", "b"],
        ["--threads", "0"],
    ],
)
def test_wrong_usage_is_refused(arguments: list[str]) -> None:
    result = RUNNER.invoke(cli.app, ["run", *arguments])
    assert result.exit_code == 2
