"""`kvpress eval --shards`: processes share the contexts, and leave the file of one process."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import ranks
import sharing
from kvpress.bench.shards.work import Found, Unit, in_order
from typer.testing import CliRunner

from kvpress.cli import app

EVAL = ["eval", "--suite", "copy,needle", "--protocol", "hidden", "--length", "256"]
EVAL += ["--samples", "2", "--threads", "1", "--device", "cpu"]
POLICIES = ["full", "h2o:budget=0.5", "keyformer:budget=0.3", "random:budget=0.3"]


def asked(model: Path, out: Path, *policies: str) -> list[str]:
    names = [word for name in policies for word in ("--policy", name)]
    return [*EVAL, "--model", str(model), "--out", str(out), *names]


def test_results_come_in_the_order_of_one_process() -> None:
    todo = [Unit(1, (0, 2)), Unit(4, (1,)), Unit(5, (0, 1, 2))]
    every = [Found(unit.number, part) for unit in todo for part in unit.parts]
    for seed in range(20):
        mixed = every.copy()
        random.Random(seed).shuffle(mixed)
        assert list(in_order(todo, mixed)) == every
    coming = iter(every)
    assert next(in_order(todo, coming)) == every[0] and next(coming) == every[1]  # at once


def test_two_processes_leave_the_file_of_one(tmp_path: Path, tiny_model: Path) -> None:
    alone, out = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    said = sharing.called(*asked(tiny_model, alone, *POLICIES)).stdout
    words = [*asked(tiny_model, out, *POLICIES), "--shards", "2"]
    (first, error), *others = ranks.together(2, sharing.say, tmp_path, *words)
    assert not error and others == [("", "")]
    assert sharing.text(out) == sharing.text(alone)
    assert len(sharing.rows(out)) == 1 + 2 * 2 * 5
    assert first.split()[:12] == said.split()[:12]  # tables
    before = out.read_text()
    ranks.together(2, sharing.say, tmp_path, *words)
    assert out.read_text() == before


def test_a_second_run_repeats_no_finished_cell(tmp_path: Path, tiny_model: Path) -> None:
    policy, alone, out = sharing.noted(tmp_path, "noted"), tmp_path / "a", tmp_path / "b"
    sharing.called(*asked(tiny_model, alone, "full", policy))
    lines = alone.read_text().splitlines(keepends=True)
    rest = "".join(lines[:9]) + lines[9][:20]  # two contexts, two cells of the third, half a line
    alone.write_text(rest)
    sharing.times_asked(policy)
    sharing.called(*asked(tiny_model, alone, "full", policy))
    once = sharing.times_asked(policy)
    out.write_text(rest)
    words = [*asked(tiny_model, out, "full", policy), "--shards", "2"]
    assert all(not error for _, error in ranks.together(2, sharing.say, tmp_path, *words))
    assert sharing.times_asked(policy) == once > 0
    assert sharing.text(out) == sharing.text(alone)


def test_a_lost_process_ends_the_others_and_the_file_is_gone_on_with(
    tmp_path: Path, tiny_model: Path
) -> None:
    long = "slots.position_BHS.shape[-1] > 400"
    policy, out = sharing.noted(tmp_path, "deadly", dies=long), tmp_path / "b"
    words = [*asked(tiny_model, out, "full", policy), "--length", "512"]
    shared = [*words, "--shards", "2"]
    start = time.monotonic()
    first, second = ranks.run(2, sharing.say, tmp_path, *shared)
    assert time.monotonic() - start < 60
    assert (first.code, second.code) in {(0, 9), (9, 0)}
    (survivor,) = (process for process in (first, second) if process.code == 0)
    assert "ShardError" in survivor.found[1] and "go on from it" in survivor.found[1]
    written = sharing.rows(out)
    sharing.spare(policy)
    assert all(not error for _, error in ranks.together(2, sharing.say, tmp_path, *shared))
    words[words.index(str(out))] = str(tmp_path / "alone")
    sharing.called(*words)
    assert sharing.rows(out)[: len(written)] == written
    assert sharing.text(out) == sharing.text(tmp_path / "alone")


def other(rank: int, world: int, folder: Path, *given: str) -> tuple[str, str]:
    """The second process is asked for other samples."""
    return sharing.say(rank, world, folder, *given, "--seed", str(rank))


def test_processes_that_are_asked_for_something_else(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    words = [*asked(tiny_model, out, "full"), "--shards", "2"]
    for _, error in ranks.together(2, other, tmp_path, *words):
        assert "ShardError" in error and "same command" in error
    assert len(out.read_text().splitlines()) == 1


def test_another_number_of_processes_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    words = asked(tiny_model, tmp_path / "out", "full")
    (_, error), _ = ranks.together(2, sharing.say, tmp_path, *words, "--shards", "3")
    assert "--shards 3, but 2 processes were started" in error
    for _, error in ranks.together(2, sharing.say, tmp_path, *words):
        assert "torchrun started 2 processes, and each would do all of it" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shards", "2"], "was started alone"),
        (["--shards", "2", "--tp", "2"], "whole model on one device"),
        (["--shards", "2", "--ray", "2"], "whole model on one device"),
        (["--shards", "2", "--device-map", "auto"], "whole model on one device"),
        (["--ray", "2", "--tp", "2"], "each actor holds the whole model"),
        (["--ray", "2", "--lm-eval", "x"], "whose tasks are its own"),
    ],
)
def test_what_does_not_go_together(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    done = CliRunner().invoke(app, ["eval", *options], env={"COLUMNS": "300"})
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())
