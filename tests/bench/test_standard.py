"""lm-eval with the engine: a task of our own, offline. Skipped where lm-eval is not installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.errors import KVPressError

pytest.importorskip("lm_eval", reason="pip install kvpress-engine[eval]")

FILLER = "The grass is green and the sky is blue. " * 12
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output}
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
"""
CHOICES = 'doc_to_choice: "{{choices}}"'
UNTIL = 'generation_kwargs:\n  max_gen_toks: 8\n  until: ["."]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Two tasks about secret codes, as files of lm-eval."""
    root = tmp_path_factory.mktemp("tasks")
    codes = ["48213", "90127", "35584", "67091"]
    lines = [
        {
            "context": f"The secret code of the harbour is {code}. {FILLER}\n\nQuestion: What is"
            " the secret code of the harbour?\nAnswer: The secret code of the harbour is",
            "choices": [f" {each}" for each in codes],
            "label": i,
            "code": code,
        }
        for i, code in enumerate(codes)
    ]
    data = root / "codes.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, output, target, more, metric in (
        ("secret_choice", "multiple_choice", "label", CHOICES, "acc"),
        ("secret_code", "generate_until", '" {{code}}"', UNTIL, "exact_match"),
    ):
        text = TASK.format(
            name=name, data=data, output=output, target=target, more=more, metric=metric
        )
        (root / f"{name}.yaml").write_text(text)
    return root


@pytest.fixture(scope="module")
def speaking(tiny_model: Path, tmp_path_factory: Any) -> Path:
    """The tiny model with an end of text and a chat template, which lm-eval asks for."""
    where: Path = tmp_path_factory.mktemp("speaking")
    shutil.copytree(tiny_model, where, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(where)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    tokenizer.save_pretrained(where)
    return where


def cells(folder: Path, tasks: str, policies: str, *more: str) -> list[dict[str, Any]]:
    options = ["--lm-eval", tasks, "--task-folder", str(folder), "--policy", policies, "--json"]
    done = CliRunner().invoke(app, ["eval", *options, *more])
    assert done.exit_code == 0, done.exception or done.output
    made: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("[\n") :])
    return made


def measured(folder: Path, tasks: str, policies: str, *more: str) -> dict[tuple[str, str], float]:
    return {
        (score["task"], cell["policy"]): score["value"]
        for cell in cells(folder, tasks, policies, *more)
        for score in cell["scores"]
    }


@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
def test_policies_are_compared_on_tasks_of_lm_eval(folder: Path) -> None:
    """The first sentence holds the answer: it is lost to a policy that keeps the last tokens."""
    window = "streaming_llm:budget=24,sink=0"
    made = measured(folder, "secret_choice,secret_code", f"full,snapkv:budget=0.5,{window}")
    choices, words = (
        [made[task, policy] for policy in ("full", "snapkv:budget=0.5", window)]
        for task in ("secret_choice", "secret_code")
    )
    assert choices[0] == choices[1] == 1.0 and choices[2] <= 0.5
    assert words[0] == 1.0 and words[2] == 0.0


def _documents(folder: Path) -> list[str]:
    return (folder / "codes.jsonl").read_text().splitlines()


def command_line(*options: str) -> Any:
    return CliRunner().invoke(app, ["eval", *options])


@pytest.mark.filterwarnings("ignore")
def test_every_finished_policy_is_kept_with_its_bytes_and_not_run_again(
    folder: Path, tmp_path: Path, speaking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "cells.jsonl", tmp_path / "page.md"
    known = ("--model", str(speaking), "--out", str(out), "--max-new-tokens", "70")
    window = "streaming_llm:budget=400,sink=4"
    made = cells(folder, "secret_code,secret_choice", f"full,{window}", *known)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[1:] == made and len(made) == 4
    assert lines[0]["settings"]["lm_eval"]["new_tokens"] == 70
    for cell in made:
        share = cell["bytes_held"] / cell["bytes_full"]
        assert (0.99 < share < 1.1) if cell["policy"] == "full" else (0.5 < share < 0.8)
        (score,) = cell["scores"]
        assert (score["documents"], cell["protocol"], cell["metric"]) == (4, "visible", "lm_eval")
    generated = [c["longest"] for c in made if c["task"] == "secret_code"]
    (prompt,) = {len(json.loads(line)["context"]) for line in _documents(folder)}
    assert all(prompt < longest <= prompt + 70 for longest in generated)

    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **__: pytest.fail("run again"))
    assert cells(folder, "secret_code,secret_choice", f"full,{window}", *known) == made
    refused = command_line("--lm-eval", "secret_code", "--chat", *known)
    with pytest.raises(KVPressError, match=r"other settings \(lm_eval: .*another --out"):
        raise refused.exception
    assert CliRunner().invoke(app, ["report", str(out), "--out", str(page)]).exit_code == 0
    assert f"| secret_code | exact_match | {window} |" in page.read_text()


@pytest.mark.filterwarnings("ignore")
def test_prompts_go_through_the_chat_template_when_asked(folder: Path, speaking: Path) -> None:
    given = ("--model", str(speaking), "--limit", "1", "--max-new-tokens", "1")
    lengths = [
        cells(folder, "secret_code", "full", *given, *more)[0]["longest"]
        for more in ((), ("--chat",))
    ]
    assert lengths[1] - lengths[0] == len("<user><assistant>")


@pytest.mark.filterwarnings("ignore")
def test_a_budget_that_no_document_outgrows_is_said(folder: Path, speaking: Path) -> None:
    given = ("--lm-eval", "secret_choice", "--task-folder", str(folder), "--limit", "1")
    policies = ("--policy", "full,streaming_llm:budget=900", "--model", str(speaking))
    done = command_line(*given, *policies)
    assert done.exit_code == 0, done.exception
    words = " ".join(done.stdout.split())
    assert "holds as many bytes as the full cache" in words and "kept" in words


@pytest.mark.filterwarnings("ignore")
def test_a_policy_that_fails_is_a_row_with_its_error(
    folder: Path, tmp_path: Path, speaking: Path
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN)
    made = cells(folder, "secret_choice", f"{broken}:budget=0.5,full", "--model", str(speaking))
    assert [cell["policy"] for cell in made] == [f"{broken}:budget=0.5", "full"]
    assert "no good" in made[0]["error"] and made[1]["error"] is None


BROKEN = """
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvpress.policy import Budget, Policy, Slots, option


@dataclass(frozen=True, kw_only=True)
class Broken(Policy):
    budget: Budget = option(0.5, "kept")

    def score(self, slots: Slots) -> Tensor:
        raise ArithmeticError("no good")
"""
MADE = """
task: made
custom_dataset: !function made.documents
dataset_path: ""
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
"""
MAKER = """
import datasets
from transformers import AutoTokenizer


def documents(tokenizer, max_seq_lengths, **more):
    read = AutoTokenizer.from_pretrained(tokenizer)
    lengths = [len(read(" day" * length).input_ids) for length in max_seq_lengths]
    rows = [{"context": " day" * n, "choices": ["day", "%"]} for n in lengths]
    return {"test": datasets.Dataset.from_list(rows)}
"""


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_makes_its_documents_is_told_the_tokenizer_and_the_lengths(
    tmp_path: Path,
) -> None:
    """As those of RULER do."""
    (tmp_path / "made.yaml").write_text(MADE)
    (tmp_path / "made.py").write_text(MAKER)
    made = measured(tmp_path, "made", "full", "--metadata", '{"max_seq_lengths": [40, 60]}')
    assert made == {("made", "full"): 1.0}


@pytest.mark.filterwarnings("ignore")
def test_a_task_whose_data_are_not_there_is_refused(tmp_path: Path) -> None:
    text = TASK.format(
        name="gone",
        data=tmp_path / "gone.jsonl",
        output="multiple_choice",
        target="label",
        more=CHOICES,
        metric="acc",
    )
    (tmp_path / "gone.yaml").write_text(text)
    options = ["--lm-eval", "gone", "--task-folder", str(tmp_path)]
    done = CliRunner().invoke(app, ["eval", *options])
    with pytest.raises(KVPressError, match=r"cannot load gone: .*gone\.jsonl"):
        raise done.exception


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused(folder: Path) -> None:
    done = CliRunner().invoke(app, ["eval", "--lm-eval", "no_such_task", "--model", "demo"])
    assert isinstance(done.exception, KVPressError) and "no_such_task" in str(done.exception)


def test_the_command_line_of_lm_eval_knows_the_model(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvpress.bench.quality.harness", "run", "--model", "kvpress"]
    command += ["--model_args", "pretrained=demo,policy=snapkv:budget=0.5;window=16"]
    command += ["--tasks", "secret_choice", "--include_path", str(folder)]
    command += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["secret_choice"]["acc,none"] == 1.0
