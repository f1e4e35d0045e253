"""`kvpress bench`: every case runs on tiny shapes and leaves readable results."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from kvpress.bench.commands import bench
from kvpress.bench.common.timing import interleave
from kvpress.bench.operators import cases as operators
from kvpress.bench.operators import measure
from kvpress.bench.speed import overhead
from typer.testing import CliRunner

from kvpress import ops

CPU = torch.device("cpu")


def test_ops_checks_and_times_every_case(tmp_path: Path) -> None:
    out, plot = tmp_path / "ops.json", tmp_path / "ops.png"
    options = ["--quick", "--rounds", "2", "--warmup", "1", "--device", "cpu"]
    done = CliRunner().invoke(bench, ["ops", *options, "--out", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    text = json.dumps(json.loads(out.read_text()))
    groups = ("decode_rows", "decode_step", "attention_sums", "match_keys")
    for name in (*groups, "gather_slots", "scatter_slots"):
        assert name in text
    assert plot.read_bytes()[:4] == b"\x89PNG"


def test_rounds_run_every_candidate_in_rotating_order() -> None:
    calls: list[tuple[str, int]] = []
    candidates = {name: lambda number, name=name: calls.append((name, number)) for name in "abc"}
    samples = interleave(candidates, rounds=3, warmup=1)
    assert {name: s.count for name, s in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert [number for _, number in calls] == [n for n in range(4) for _ in range(3)]
    assert len({tuple(name for name, n in calls if n == number) for number in range(4)}) == 3


def test_an_operator_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in operators.cases(quick=True) if c.group == "decode_rows")
    right = ops.decode_rows

    def wrong(*args: object) -> tuple[torch.Tensor, ...]:
        out, lse, weights = right(*args)
        return out * 1.001, lse, weights

    assert measure.measure(case, CPU, 1, 0).samples
    monkeypatch.setattr(ops, "decode_rows", wrong)
    outcome = measure.measure(case, CPU, 1, 0)
    assert "out is off by" in str(outcome.refused) and not outcome.samples


def test_a_case_counts_the_bytes_of_its_keys_and_values() -> None:
    for case in operators.cases():
        if case.group != "decode_rows" or case.name.endswith("ragged"):
            continue
        shape = case.parameters
        rows = shape["batch"] * shape["kv_heads"]
        item = 4 if shape["storage"] == "float32" else 2
        assert case.bytes == rows * shape["slots"] * 2 * shape["width"] * item
    sizes = {c.name: c.bytes for c in operators.cases() if c.group == "decode_rows"}
    for name, size in sizes.items():
        assert abs(size - sizes[name.removesuffix("-ragged")]) < 0.01 * size


def test_overhead_is_per_layer_and_step() -> None:
    samples = overhead.measure(helpers.tiny("llama"), ["h2o:budget=1"], 3, 1)
    assert samples["h2o:budget=1"].count == 3


@pytest.mark.parametrize(
    "options", [["--device", "tpu"], ["--out", "/no/such/folder/x.json"], ["--rounds", "0"]]
)
def test_bad_options_are_refused(options: list[str]) -> None:
    done = CliRunner().invoke(bench, ["ops", "--quick", *options])
    assert done.exit_code == 2
