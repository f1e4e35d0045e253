"""Commands that several processes run: the first one alone prints and writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks

from kvpress import parallel
from kvpress.errors import AttachError


def say(rank: int, world: int, path: Path, *given: str) -> tuple[str, int]:
    """What a process printed, and its exit code."""
    os.chdir(path)
    said = path / f"said{rank}"
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    from kvpress.cli import app

    code = app(list(given), standalone_mode=False)
    sys.stdout.flush()
    return said.read_text(encoding="utf-8"), code or 0


RUN = ("run", "--policy", "h2o:budget=0.5", "--prompt", "A list of colours: red, green,")
RUN += ("--max-new-tokens", "6", "--json", "--device", "cpu")


def test_run(demo: tuple[Any, Any], tmp_path: Path) -> None:
    """The text of one process; bytes of all of them."""
    ranks.distributed()
    folder = tmp_path / "alone"
    folder.mkdir()
    ((said, _),) = ranks.together(1, say, folder, *RUN)
    alone = json.loads(said)[0]
    first, *others = ranks.together(3, say, tmp_path, *RUN, "--tp", "3")
    assert all(said == "" for said, _ in others)
    result = json.loads(first[0])[0]
    assert result["texts"] == alone["texts"]
    held = [part["held"] for part in result["report"]["ranks"]]
    assert len(held) == 3 and abs(sum(held) - alone["report"]["bytes_held"]) < 256 * 3 * 30


EVAL = ("eval", "--quick", "--suite", "pairs", "--samples", "1", "--policy", "h2o:budget=0.5")
EVAL += ("--length", "256", "--json", "--out", "quality.jsonl", "--device", "cpu", "--tp", "3")


def test_eval_writes_once(demo: tuple[Any, Any], tmp_path: Path) -> None:
    ranks.distributed()
    first, *others = ranks.together(3, say, tmp_path, *EVAL)
    assert all(said == "" for said, _ in others)
    cells = json.loads(first[0])
    lines = (tmp_path / "quality.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + len(cells) > 2  # settings stand before them
    assert not any(cell["error"] for cell in cells)


def test_a_command_that_was_started_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(AttachError, match="torchrun --nproc-per-node"):
        parallel.start("cpu")


def is_refused(rank: int, world: int, path: Path) -> str:
    try:
        say(rank, world, path, *RUN, "--tp", "2")
    except Exception as error:
        return str(error)
    return ""


def test_another_number_of_processes(tmp_path: Path) -> None:
    (said,) = ranks.together(1, is_refused, tmp_path)
    assert "torchrun started 1 processes" in said
