"""`scripts/gpu`: kernel tests first, nothing timed after a red one, one file with every part."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress.bench.common import models
from kvpress.bench.gpu import measure as gpu
from kvpress.bench.operators import cases as operators
from typer.testing import CliRunner

from kvpress import ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RAN = """
import os

def test_triton(record_testsuite_property):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    record_testsuite_property("triton", "cpu" if interpreted else "cuda")
"""
RED = RAN + "\ndef test_sum():\n    assert 1 + 1 == 3\n"
NO_KERNEL = "def test_nothing():\n    pass\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "test_kernels.py"
    path.write_text(text, encoding="utf-8")
    return path


def invoke(folder: Path, model: Path, tests: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit status of a quick run on the CPU, and what it wrote."""
    out = folder / "gpu.json"
    given = ["--device", "cpu", "--quick", "--tokens", "160", "--model", str(model)]
    done = CliRunner().invoke(gpu.app, [*given, "--tests", str(tests), "--out", str(out), *options])
    return done.exit_code, json.loads(out.read_text()) if out.is_file() else {}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the operators' cases: test_commands.py runs all of them."""
    cases = operators.cases(quick=True)
    chosen = [next(c for c in cases if c.group == g) for g in ("decode_rows", "gather_slots")]
    monkeypatch.setattr(operators, "cases", lambda quick, long: chosen)


@pytest.fixture
def green(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel tests that passed, without running any."""
    monkeypatch.setattr(gpu, "kernel_tests", lambda *_: {"passed": 1, "refused": None})


@pytest.mark.usefixtures("few")
def test_one_file_holds_every_part(tmp_path: Path, tiny_model: Path) -> None:
    status, results = invoke(tmp_path, tiny_model, written(tmp_path, RAN))
    assert status == 0 and results["complete"]
    facts = results["environment"]
    assert facts["device"] == "cpu" and facts["versions"]["torch"] == torch.__version__
    assert {"commit", "backends", "time"} <= set(facts)
    assert results["settings"]["device"] == "cpu" and results["settings"]["tokens"] == 160
    tests = {name: results["tests"][name] for name in ("passed", "failed", "skipped", "refused")}
    assert tests == {"passed": 1, "failed": 0, "skipped": 0, "refused": None}
    for case in results["operators"]:
        assert {"probe", case["group"]} <= set(case["candidates"])
        assert case["candidates"][case["group"]]["share_of_probe"] > 0
    for part in ("decode", "prefill"):
        names = [row["candidate"] for row in results[part]]
        assert names[:2] == ["transformers", "full"] and len(names) == 4
        assert all(row["seconds"]["median"] > 0 for row in results[part])


def test_after_a_red_test_nothing_is_timed(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "measurements", lambda *_: pytest.fail("something was timed"))
    status, results = invoke(tmp_path, tiny_model, written(tmp_path, RED))
    assert status == 1 and not results["complete"]
    assert results["tests"]["passed"] == 1 and results["tests"]["failed"] == 1
    (failure,) = results["tests"]["failures"]
    assert "test_sum: " in failure and "assert (1 + 1) == 3" in failure
    assert results["tests"]["refused"] == "1 kernel tests failed"
    assert not {"operators", "decode", "prefill"} & set(results)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (NO_KERNEL, "no test ran a Triton kernel on cpu"),
        ("import no_such_module\n", "kernel tests failed"),
        ("", "pytest ended with 5"),
        (RAN.replace("def ", "import pytest\n\n@pytest.mark.skip\ndef "), "pytest ended with 0"),
    ],
    ids=["no kernel", "broken", "empty", "skipped"],
)
def test_tests_that_show_nothing_are_red(tmp_path: Path, text: str, reason: str) -> None:
    found = gpu.kernel_tests(CPU, written(tmp_path, text))
    assert reason in found["refused"]


def test_on_a_gpu_the_kernels_are_compiled_and_on_the_cpu_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = gpu.kernel_tests(CUDA, written(tmp_path, RAN))
    assert (found["ran_on"], found["refused"]) == ("cuda", None)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert gpu.kernel_tests(CPU, tmp_path)["ran_on"] == "cpu"


def test_interpreted_kernels_do_not_count_on_a_gpu() -> None:
    found = {"exit_status": 0, "passed": 64, "failed": 0, "ran_on": "cpu"}
    assert gpu._refused(found, "cpu") is None
    assert "on cuda" in str(gpu._refused(found, "cuda"))


@pytest.mark.usefixtures("green")
def test_a_refused_operator_is_red_but_the_rest_is_measured(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parts(*_: Any) -> Iterator[tuple[str, Any]]:
        yield "operators", [{"refused": None}, {"refused": "out is off by 1"}]
        yield "decode", []

    monkeypatch.setattr(gpu, "measurements", parts)
    status, results = invoke(tmp_path, tiny_model, tmp_path)
    assert status == 1 and results["complete"] and results["decode"] == []


@pytest.mark.usefixtures("green")
def test_what_was_measured_stays_when_a_later_part_breaks(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parts(*_: Any) -> Iterator[tuple[str, Any]]:
        yield "operators", [{"refused": None}]
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "measurements", parts)
    status, results = invoke(tmp_path, tiny_model, tmp_path)
    assert status == 1 and results["operators"] and not results["complete"]


def test_without_a_gpu_the_cpu_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(gpu.GpuError, match=r"no CUDA device.*--device cpu runs it on the CPU"):
        gpu.require_device(None)
    assert gpu.require_device("cpu") == CPU
    assert CliRunner().invoke(gpu.app, ["--device", "cuda"]).exit_code == 2
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()


def test_a_gpu_whose_operators_are_references_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "chosen_device", torch.device)
    monkeypatch.setattr(ops, "backends", lambda: {"cuda": "reference: Triton is not installed"})
    with pytest.raises(gpu.GpuError, match="'reference: Triton is not installed'"):
        gpu.require_device("cuda")
    monkeypatch.setattr(ops, "backends", lambda: {"cuda": "triton"})
    assert gpu.require_device("cuda") == CUDA


def test_wrong_options_are_refused_before_the_tests_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: pytest.fail("tests ran"))
    options = ["--device", "cpu", "--quick", "--out", str(tmp_path / "x.json")]
    done = CliRunner().invoke(gpu.app, [*options, "--model", "/no/such/model"])
    assert isinstance(done.exception, models.ModelError)
    done = CliRunner().invoke(gpu.app, [*options, "--out", "/no/such/folder/x.json"])
    assert done.exit_code == 2
    with pytest.raises(gpu.GpuError, match="checkout"):
        gpu.kernel_tests(CPU, tmp_path / "no-tests")


def test_the_default_file_names_the_device_and_keeps_quick_runs_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    folder = tmp_path / "bench" / "results"
    assert gpu._default_out("NVIDIA H100 80GB HBM3", False) == (
        folder / "gpu-nvidia-h100-80gb-hbm3.json"
    )
    assert gpu._default_out("cpu", True) == folder / "gpu-cpu-quick.json"
    assert folder.is_dir()


def test_the_kernels_of_every_operator_are_compiled_ahead_of_time() -> None:
    """In a process of its own, since other tests import Triton to be interpreted."""
    pytest.importorskip("triton")
    code = (
        "from kvpress.bench.gpu import launches; print({x.operator for x in launches.launches(80)})"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = {"attend_sums", "scatter_slots", "decode_chosen"}  # which launch the kernels of others
    kernels = (Path(gpu.ROOT) / "csrc").glob("*/triton_kernel.py")
    assert ast.literal_eval(done.stdout) == {path.parent.name for path in kernels} - shared
