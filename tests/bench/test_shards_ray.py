"""`--ray`: actors of Ray share contexts and sizes, and leave the files of one process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sharing
from kvpress.bench.shards import actors, cluster
from kvpress.bench.shards.errors import ShardError
from typer.testing import CliRunner

from kvpress.cli import app

EVAL = ["eval", "--suite", "copy", "--protocol", "hidden", "--length", "256", "--length", "300"]
EVAL += ["--samples", "2", "--threads", "1", "--device", "cpu"]
LONGER = "slots.position_BHS.shape[-1] > 280"  # than the first contexts


@pytest.fixture(scope="module")
def two() -> Iterator[None]:
    """A Ray of two cores in this process."""
    reason = "Ray is not installed: pip install kvpress-engine[ray]"
    ray = pytest.importorskip("ray", reason=reason)
    with pytest.MonkeyPatch.context() as changed:
        for name, value in cluster.QUIET.items():
            changed.setenv(name, value)
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=80 * 2**20,
            logging_level=logging.ERROR,
        )
        yield
        ray.shutdown()


def asked(model: Path, out: Path, *policies: str) -> list[str]:
    names = [word for name in policies for word in ("--policy", name)]
    return [*EVAL, "--model", str(model), "--out", str(out), *names]


def test_two_actors_leave_the_file_of_one_process(
    two: None, tmp_path: Path, tiny_model: Path
) -> None:
    """One of them dies in between, after the first cell of a context."""
    policy = sharing.noted(tmp_path, "deadly", dies=LONGER, once=True)
    out, alone = tmp_path / "shared.jsonl", tmp_path / "alone.jsonl"
    kept = sharing.noted(tmp_path, "kept")
    words = ("full", "random:budget=0.3", kept, policy)
    shared = sharing.called(*asked(tiny_model, out, *words), "--ray", "2")
    assert Path(policy).with_suffix(".spared").exists()  # it died
    asked_often = sharing.times_asked(kept)
    one = sharing.called(*asked(tiny_model, alone, *words))
    assert sharing.text(out) == sharing.text(alone)
    assert sharing.times_asked(kept) == asked_often  # no finished cell was repeated
    assert " ".join(one.stdout.split()[:12]) in " ".join(shared.stdout.split())  # tables


def test_a_context_whose_actors_always_die_is_kept_with_an_error(
    two: None, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "REPEATS", 1)
    policy, out = sharing.noted(tmp_path, "deadly", dies=LONGER), tmp_path / "shared.jsonl"
    words = asked(tiny_model, out, "full", policy)
    words[words.index("--samples") + 1] = "1"
    sharing.called(*words, "--ray", "2")
    cells = sharing.rows(out)[1:]
    assert [(c["tokens"], c["policy"]) for c in cells] == [
        (tokens, name) for tokens in (256, 300) for name in ("full", policy, "no context")
    ]
    errors = [cell["error"] for cell in cells]
    assert errors[:4] == [None] * 4
    assert all("ShardError: its actor of Ray died 2 times" in error for error in errors[4:])
    sharing.spare(policy)
    sharing.times_asked(policy)
    sharing.called(*words, "--ray", "1")  # those that failed, and no others
    assert [row["policy"] for row in sharing.rows(out)[7:]] == [policy, "no context"]
    assert not any(row.get("error") for row in sharing.rows(out)[7:])


def test_sizes_are_shared_and_rows_are_those_of_one_process(
    two: None, tmp_path: Path, tiny_model: Path
) -> None:
    words = ["bench", "decode", "--tokens", "100", "--tokens", "140", "--rounds", "2"]
    words += ["--model", str(tiny_model), "--threads", "1", "--device", "cpu", "--warmup", "1"]
    words += ["--policy", "full", "--policy", "h2o:budget=0.5"]
    out, alone = tmp_path / "shared.jsonl", tmp_path / "alone.jsonl"
    sharing.called(*words, "--out", str(alone))
    done = sharing.called(*words, "--out", str(out), "--ray", "3")
    assert sharing.text(out) == sharing.text(alone)
    assert "2 actors run, one for each size" in done.stderr
    assert "of one size" in " ".join(done.stderr.split())
    refused = CliRunner().invoke(app, [*words, "--ray", "2", "--with-eval"])
    assert refused.exit_code == 2 and "--with-eval" in refused.output


def test_more_actors_than_there_is_room_for(two: None, tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [*asked(tiny_model, out, "full"), "--ray", "3"])
    assert isinstance(done.exception, ShardError) and "room for 2" in str(done.exception)
    assert not out.exists()


def test_what_actors_raise_is_what_one_process_raises(
    two: None, tmp_path: Path, tiny_model: Path
) -> None:
    words = asked(tiny_model, tmp_path / "out", "full")
    words[words.index(str(tiny_model))] = "/no/model"
    done = CliRunner().invoke(app, [*words, "--ray", "1"])
    assert type(done.exception).__name__ == "ModelError" and "/no/model" in str(done.exception)


# ---- without Ray


def test_each_actor_gets_its_share() -> None:
    small, large = {"CPU": 2.0}, {"CPU": 10.0, "GPU": 2.0}
    share = cluster.share_of
    assert share([small], 2, 0, None) == (1, 1, 0)
    assert share([small, large], 3, 0, None) == (3, 3, 0)  # all on the large one
    assert share([small, large], 4, 0, 2) == (2, 2, 0)
    assert share([large], 2, 1, None) == (5, 5, 1)
    assert share([small], 1, 0, 8) == (8, 2, 0)  # threads as asked, though Ray has fewer cores
    for actors_, gpus, room in ((3, 1, 2), (13, 0, 12)):
        with pytest.raises(ShardError, match=f"room for {room}"):
            share([small, large], actors_, gpus, None)
    with pytest.raises(ShardError, match="room for 0"):
        share([], 1, 0, None)


@pytest.mark.parametrize("command", [["eval"], ["bench", "prefill"]])
def test_without_ray_it_is_said_how_to_get_it(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = CliRunner().invoke(app, [*command, "--ray", "2"])
    assert isinstance(done.exception, ShardError)
    assert 'pip install "kvpress-engine[ray]"' in str(done.exception)


def test_a_client_s_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        is_initialized = staticmethod(lambda: False)

    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    monkeypatch.setitem(sys.modules, "ray", Package)
    with pytest.raises(ShardError, match="RAY_ADDRESS=auto"), cluster.cluster():
        pass
