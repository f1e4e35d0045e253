"""lm-eval with the engine: a task of our own, offline. Skipped where lm-eval is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
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


def measured(folder: Path, tasks: str, policies: str, *more: str) -> dict[tuple[str, str], float]:
    options = ["--lm-eval", tasks, "--task-folder", str(folder), "--policy", policies, "--json"]
    done = CliRunner().invoke(app, ["eval", *options, *more])
    assert done.exit_code == 0, done.exception or done.output
    rows = json.loads(done.stdout[done.stdout.index("[\n") :])
    return {(row["task"], row["policy"]): row["value"] for row in rows}


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
