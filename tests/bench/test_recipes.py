"""The recipes: what they would run, with stand-ins for the installer, pip and `kvpress`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from kvpress.bench.quality.options import metadata_of, refuse_idle, split_policies

from kvpress.cli import app
from kvpress.policy.loading import parse

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.name for path in (ROOT / "scripts" / "recipes").iterdir())
NOTE = f"""#!{sys.executable}
import json, sys
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""
COMMANDS: Any = typer.main.get_command(app)


def calls(name: str, root: Path, *options: str, **variables: str) -> list[list[str]]:
    """The arguments of every `kvpress` that the recipe runs, from another folder."""
    for path, text in (
        ("scripts/install", "#!/bin/sh\n"),
        (".venv/bin/python", "#!/bin/sh\n"),
        (".venv/bin/kvpress", NOTE),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        (root / path).chmod(0o755)
    (root / "scripts" / "recipes").mkdir(exist_ok=True)
    recipe = shutil.copy(ROOT / "scripts" / "recipes" / name, root / "scripts" / "recipes")
    plain = {"PATH": os.environ["PATH"], **variables}
    subprocess.run([recipe, *options], check=True, cwd=root / "scripts", env=plain)
    return [json.loads(line) for line in (root / "calls.jsonl").read_text().splitlines()]


def parsed(call: list[str]) -> Any:
    """The options of a call. Raises what the command line would raise for a wrong one."""
    command, *arguments = call
    return COMMANDS.commands[command].make_context(command, arguments)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_says_what_it_is_and_runs_in_any_shell(name: str) -> None:
    path = ROOT / "scripts" / "recipes" / name
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/sh -e" and os.access(path, os.X_OK) and len(lines) <= 20
    comments = [line for line in lines[1:] if line.startswith("#")]
    assert 2 <= len(comments) <= 3 and lines[1 : len(comments) + 1] == comments
    assert lines[len(comments) + 1] == 'cd "$(dirname "$0")/../.."'
    assert lines[len(comments) + 2].startswith("scripts/install ")
    assert all(len(line) <= 140 for line in lines)
    subprocess.run(["sh", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("changed", [False, True], ids=["as it is", "changed"])
def test_every_option_of_a_recipe_exists_and_every_policy_can_be_read(
    name: str, changed: bool, tmp_path: Path
) -> None:
    variables = {"MODEL": "some/model", "POLICIES": "full,h2o:budget=64,sink=4"} if changed else {}
    options = ["--dtype", "float16"] if changed else []
    made = [parsed(call) for call in calls(name, tmp_path, *options, **variables)]
    evaluations = [context for context in made if context.command.name == "eval"]
    assert evaluations
    for context in evaluations:
        refuse_idle(context)
        metadata_of(context.params["metadata"])
        policies = list(split_policies(context.params["policy"]))
        assert policies[0] == "full" and len(policies) > 1
        for policy in policies:
            parse(policy)
        if changed:
            assert policies[1:] == ["h2o:budget=64,sink=4"]
            given = [context.params[name] for name in ("model", "dtype")]
            assert given == ["some/model", "float16"]


def test_lengths_come_one_by_one_where_a_limit_would_leave_only_the_first(tmp_path: Path) -> None:
    needle = [parsed(c) for c in calls("needle", tmp_path / "a", LENGTHS="300 600", OUT="o.jsonl")]
    assert needle[0].params["length"] == [300, 600]
    assert (needle[1].command.name, str(needle[1].params["out"])) == ("plot", "o.png")
    assert needle[0].params["out"] == needle[1].params["results"] == Path("o.jsonl")
    ruler = [parsed(call) for call in calls("ruler", tmp_path / "b", LENGTHS="300 600")]
    given = [metadata_of(context.params["metadata"]) for context in ruler]
    assert given == [{"max_seq_lengths": [300]}, {"max_seq_lengths": [600]}]


def test_the_recipe_of_reasoning_outgrows_its_budgets_in_chats(tmp_path: Path) -> None:
    """By what may be decoded alone; the prompts of its tasks hold worked examples besides."""
    (call,) = calls("reasoning", tmp_path)
    given = parsed(call).params
    budgets = [parse(p).limits.budget.amount for p in list(split_policies(given["policy"]))[1:]]
    assert budgets == [512] * 3 and given["max_new_tokens"] >= 4 * 512 and given["chat"]


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "needle"])
def test_every_recipe_keeps_what_it_finds(name: str, tmp_path: Path) -> None:
    """One file per length, since a file holds results with one set of settings."""
    outs = [parsed(call).params["out"] for call in calls(name, tmp_path)]
    assert None not in outs and len(set(outs)) == len(outs)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_has_every_task_of_the_recipes(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    asked = set()
    for name in RECIPES:
        for call in calls(name, tmp_path / name):
            asked |= set((parsed(call).params.get("lm_eval") or "").split(","))
        text = (ROOT / "scripts" / "recipes" / name).read_text()
        for given in re.findall(r"^#.*TASKS=(\S+)", text, re.M):
            asked |= set(given.split(","))
    asked.discard("")
    manager = TaskManager()
    assert {"ruler", "longbench", "gsm8k", "aime25"} <= asked
    assert [task for task in sorted(asked) if not manager.match_tasks([task])] == []
