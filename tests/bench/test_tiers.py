"""Tiers on the command line: caps as options, `kvpress bench tiers`, traces."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import typer
from kvpress.bench.commands import bench
from kvpress.bench.common import models
from kvpress.bench.common.options import ModelOptions, TieredOptions, split_device
from kvpress.bench.speed import benches
from kvpress.bench.speed.rows import Cell
from kvpress.bench.speed.setting import Setting
from typer.testing import CliRunner

import kvpress
from kvpress.cli import app
from kvpress.errors import KVPressError, TierError

RUNNER = CliRunner()


def invoke(command: Any, *arguments: Any) -> str:
    done = RUNNER.invoke(command, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


# ---- options


@pytest.mark.parametrize(
    ("given", "place", "cap"),
    [
        (None, None, None),
        ("cpu", "cpu", None),
        ("cuda:1", "cuda:1", None),
        ("512MiB", None, "512MiB"),
        ("0.2", None, "0.2"),
        ("cpu,512MiB", "cpu", "512MiB"),
        ("cuda:0, 1GiB", "cuda:0", "1GiB"),
        ("cpu,", "cpu", ""),
    ],
)
def test_a_device_may_have_a_cap(given: str | None, place: str | None, cap: str | None) -> None:
    assert split_device(given) == (place, cap)
    assert TieredOptions(device=given).source.device == place


def test_commands_without_tiers_refuse_a_cap() -> None:
    assert ModelOptions(device="cpu").source.device == "cpu"
    with pytest.raises(typer.BadParameter, match="without a cap"):
        _ = ModelOptions(device="cpu,512MiB").source


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "512MB!"], "is no size"),
        (["--device", "cpu,"], "is no size"),
        (["--host", "1GiB"], "without device="),
        (["--device", "1MiB", "--host", "much"], "host='much' is no size"),
        (["--device", "1MiB", "--disk", "1GiB"], "cannot be read"),
        (["--device", "1MiB", "--disk", "1GiB:/no/such/folder"], "does not exist"),
    ],
)
@pytest.mark.parametrize("command", [["run"], ["bench", "decode"], ["bench", "throughput"]])
def test_wrong_caps_are_refused_before_a_model_is_loaded(
    command: list[str], options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.Source, "load", lambda _: pytest.fail("a model was loaded"))
    with pytest.raises(TierError, match=message):
        invoke(app, *command, *options)


def test_run_says_what_tiers_did(tiny_model: Path, tmp_path: Path) -> None:
    """Two policies in turn, in one folder, which is left empty."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the rain fell on the hills " * 36)
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["--model", tiny_model, "--prompt-file", prompt, "--max-new-tokens", 3, "--json"]
    caps = ["--device", "cpu,512KiB", "--host", "300KiB", "--disk", f"2MiB:{disk}"]
    policies = ["--policy", "full", "--policy", "snapkv:budget=0.8"]
    capped = json.loads(invoke(app, "run", *options, *policies, *caps))
    plain = json.loads(invoke(app, "run", *options, *policies))
    for ours, theirs in zip(capped, plain, strict=True):
        assert ours["texts"] == theirs["texts"]
        assert ours["report"]["tiers"]["caps"]["disk"] == 2 << 20
        assert "tiers" not in theirs["report"]
    assert capped[0]["report"]["tiers"]["hits"]["disk"] > 0
    assert not list(disk.iterdir())


@pytest.mark.parametrize("name", ["decode", "throughput"])
def test_benches_of_time_run_under_caps(name: str, tmp_path: Path) -> None:
    caps = {"device": "512KiB", "host": "300KiB", "disk": f"4MiB:{tmp_path}"}
    setting = Setting(model="tiny", rounds=2, warmup=0, new_tokens=3, caps=caps)
    assert setting.to_dict()["caps"] == caps and "caps" not in Setting(model="tiny").to_dict()
    ids, names = helpers.prompt(2, 400), ["transformers", "full", "snapkv:budget=0.9"]
    model = helpers.tiny("llama")
    cell = Cell(name, 400, 2)
    rows = benches.timed(setting, benches.LocalCandidates(), model, ids, cell, names)
    for row in rows.values():
        assert row["error"] is None, row
    least = 2 * 3 * 2 * 2 * 16 * 400 * 4  # sequences that are different share nothing
    assert rows["full"]["bytes_held"] > least
    assert not list(tmp_path.iterdir())


# ---- traces


def test_view_writes_a_trace_of_a_step(tiny_model: Path, tmp_path: Path) -> None:
    out, disk = tmp_path / "trace.json", tmp_path / "disk"
    disk.mkdir()
    options = ["--model", tiny_model, "--prompt", "x" * 900, "--policy", "full", "--trace", out]
    caps = ["--device", 0.75, "--host", 0.3, "--disk", f"1MiB:{disk}"]
    shown = invoke(app, "view", *options, *caps)
    assert "Tiers: device" in shown and "Wrote" in shown
    made = json.loads(out.read_text())
    events = [event for event in made["traceEvents"] if event["ph"] == "X"]
    names = {e["tid"]: e["args"]["name"] for e in made["traceEvents"] if e["ph"] == "M"}
    kinds = {event["cat"]: names[event["tid"]] for event in events}
    assert kinds["attention"] == kinds["decode step"] == kinds["wait"]
    assert kinds["read from the disk"].startswith("kvpress-tier")
    assert kinds["copy to the device"].startswith("kvpress-copy")
    layers = [e["args"]["layer"] for e in events if e["cat"] == "attention"]
    assert layers == [0, 1, 2]
    (step,) = [event for event in events if event["cat"] == "decode step"]
    for event in events:
        if event["cat"] in ("attention", "wait"):
            assert (
                step["ts"] <= event["ts"] <= event["ts"] + event["dur"] <= step["ts"] + step["dur"]
            )
        if event["cat"].startswith(("read", "copy")):
            assert event["args"]["bytes"] > 0
    assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "x.html"], "must end in .json"),
        (["--trace", "x.json", "--host", "0.5"], "without device="),
        (["--trace", "x.json", "--device", "1.5"], "is no size"),
        (["--trace", "x.json", "--device", "0.5", "--disk", "0.5"], "cannot be read"),
    ],
)
def test_traces_that_cannot_be_made_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.Source, "load", lambda _: pytest.fail("a model was loaded"))
    with pytest.raises(KVPressError, match=message):
        invoke(app, "view", *options)


# ---- kvpress bench tiers


def test_steps_under_caps_are_timed_beside_all_on_the_device(
    tiny_model: Path, tmp_path: Path
) -> None:
    out, disk = tmp_path / "tiers.json", tmp_path / "disk"
    disk.mkdir()
    numbers = ["--tokens", 600, "--batch", 2, "--steps", 2, "--warmup", 1, "--memory-steps", 4]
    caps = ["--device", "cpu,0.7", "--host", 0.3, "--disk", f"1.0:{disk}"]
    options = ["--model", tiny_model, *numbers, "--records", 16, "--threads", 1, "--out", out]
    shown = invoke(bench, "tiers", *options, *caps)
    record = json.loads(out.read_text())
    assert "needs a GPU" in " ".join(shown.split()) or torch.cuda.is_available()
    whole = 2 * 3 * 2 * 16 * 2 * 603 * 4
    assert record["settings"]["caps"] == {"device": "0.7", "host": "0.3", "disk": "1.0"}
    for name, row in record["candidates"].items():
        assert row["error"] is None and row["seconds"]["count"] == 2, row
        assert row["same_tokens"] and (name == "without tiers" or row["same_logits"])
    tiers = record["candidates"]["under the caps"]["tiers"]
    assert tiers["caps"]["device"] == int(0.7 * whole)
    assert tiers["pages"]["disk"] > 0 and tiers["pages"]["host"] > 0
    assert record["candidates"]["under the caps"]["per_step"]["disk to host"] > 0
    memory = record["memory"]
    assert memory["error"] is None and len(memory["resident"]) == 5
    more = 2 * 3 * 2 * 16 * 2 * 604 * 4  # a token more
    assert memory["caps"] == int(0.7 * more) + int(0.3 * more)
    assert 0 < record["disk"]["checksum"] < 1 and len(record["disk"]["rates"]) == 3
    assert not list(disk.iterdir())
    page = invoke(app, "report", out)
    assert "## Decode steps" in page and "## The disk" in page and "## Memory" in page


def test_one_layer_decodes_to_what_it_does_without_tiers(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "layer.json"
    numbers = ["--tokens", 9000, "--read", 300, "--steps", 2, "--warmup", 0]
    caps = ["--device", "0.4", "--host", "0.3"]
    options = ["--case", "one-layer", "--model", tiny_model, *numbers, *caps, "--out", out]
    shown = invoke(bench, "tiers", *options)
    assert "One layer" in shown
    rows = json.loads(out.read_text())["candidates"]
    assert list(rows) == ["without tiers", "tiers, all on the device", "under the caps"]
    capped = rows["under the caps"]
    assert capped["same_bits"] and capped["error_of_outputs"] < 5e-3
    assert capped["tiers"]["pages"]["disk"] > 0 and capped["tiers"]["pages"]["host"] > 0
    assert "## One layer" in invoke(app, "report", out)


def test_other_cases_and_wrong_caps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.Source, "load", lambda _: pytest.fail("a model was loaded"))
    done = RUNNER.invoke(bench, ["tiers", "--case", "two"])
    assert done.exit_code == 2 and "one-layer" in done.output
    with pytest.raises(TierError, match="is no size"):
        invoke(bench, "tiers", "--device", "1.2")
    with pytest.raises(TierError, match="does not exist"):
        invoke(bench, "tiers", "--disk", "1GiB:/no/such/folder")


def test_the_example_of_the_page_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tiers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {"kvpress": kvpress, "model": helpers.tiny("llama"), "folder": tmp_path}
    exec(code, {**names, "inputs": {"input_ids": helpers.prompt(1, 60)}})
    assert "Tiers: device" in capsys.readouterr().out
