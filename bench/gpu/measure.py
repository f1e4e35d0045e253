"""Kernel tests on a machine with a GPU, then measurements, in one run and one file.

The tests of the operators run first, their Triton kernels on CUDA tensors. If one fails, or none of
them launched a Triton kernel on the device, nothing is timed. The file is written after every part.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import torch
import typer
from kvpress.bench.common import models
from kvpress.bench.common.candidates import BASELINE
from kvpress.bench.common.command import command
from kvpress.bench.common.environment import environment
from kvpress.bench.common.journal import Journal, Row
from kvpress.bench.common.options import chosen_device
from kvpress.bench.common.output import check_writable, write_json
from kvpress.bench.common.prompt import prompts
from kvpress.bench.common.report import table
from kvpress.bench.common.text import default_text
from kvpress.bench.operators import cases as operators
from kvpress.bench.operators import record
from kvpress.bench.operators.measure import time_cases
from kvpress.bench.speed import benches, grid
from kvpress.bench.speed.commands import POLICIES, PREFILL_POLICIES
from kvpress.bench.speed.rows import Cell
from kvpress.bench.speed.setting import Setting
from rich.console import Console

import kvpress
from kvpress import ops
from kvpress.errors import KVPressError

ROOT = Path(kvpress.__file__).parents[1]
TESTS = ROOT / "tests" / "csrc"
RAN_ON = "triton"  # the property of the tests' report that says where the Triton kernels ran
Dtype = Annotated[
    str | None, typer.Option(help="Of the model.", show_default="bfloat16, on the CPU float32")
]
Out = Annotated[
    Path | None, typer.Option(help="A JSON file.", show_default="bench/results/gpu-DEVICE.json")
]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console, errors = Console(), Console(stderr=True)


class GpuError(KVPressError, RuntimeError):
    """A device or a checkout on which the measurements of a GPU cannot run."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured once the tests are green. Tokens are those of the prompt."""

    device: torch.device
    model: str
    dtype: str
    tokens: int
    batches: Sequence[int]
    rounds: int
    warmup: int
    quick: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = {"device": self.device.type, "batches": list(self.batches)}
        return {**vars(self), **plain, "text": default_text().to_dict()}


@command("scripts/gpu --device cpu --quick")
def gpu(
    device: Annotated[str | None, typer.Option(help="cuda or cpu.", show_default="cuda")] = None,
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face id, or a path.")] = "demo",
    dtype: Dtype = None,
    tokens: Annotated[
        int | None, typer.Option(help="Of the prompt.", show_default="8000, quick 256", min=64)
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Of decoding; repeatable.", show_default="1, 8, quick 1"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timed rounds.", show_default="9, quick 2", min=1)
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(help="Rounds that are not timed.", show_default="2, quick 1", min=0),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Everything tiny: does it run?")] = False,
    tests: Annotated[
        Path, typer.Option(help="The tests that run first.", show_default="tests/csrc")
    ] = TESTS,
    out: Out = None,
) -> None:
    """Test the Triton kernels on a GPU, then time operators, decode steps and first tokens.

    If a test fails nothing is timed, and the exit status is 1.
    """
    where = require_device(device)
    check_writable("--out", out)
    plan = Plan(
        device=where,
        model=model,
        dtype=dtype or ("bfloat16" if where.type == "cuda" else "float32"),
        tokens=tokens or (256 if quick else 8000),
        batches=batch or ([1] if quick else [1, 8]),
        rounds=rounds or (2 if quick else 9),
        warmup=(1 if quick else 2) if warmup is None else warmup,
        quick=quick,
    )
    raise typer.Exit(run(plan, tests, out))


def require_device(name: str | None) -> torch.device:
    """The device of `--device`; without it a GPU, whose operators must be the Triton kernels.

    Raises GpuError or BadParameter.
    """
    if name is None and not torch.cuda.is_available():
        raise GpuError(
            "torch sees no CUDA device, and this is for a machine that has one. Run it there;"
            " --device cpu runs it on the CPU, with the Triton kernels interpreted."
        )
    device: torch.device = chosen_device(name or "cuda")
    backend = ops.backends()["cuda"]
    if device.type == "cuda" and backend != "triton":
        raise GpuError(
            f"The operators on cuda are {backend!r}; they must be 'triton'. Install Triton"
            " (scripts/gpu does), and unset KVPRESS_BACKEND and TRITON_INTERPRET."
        )
    return device


def run(plan: Plan, tests: Path, out: Path | None = None) -> int:
    """The exit status: 1 if a test fails or an operator is refused. Writes the JSON file."""
    # Before the tests, so that a model that is not there is refused at once.
    model, tokenizer = models.load(plan.model, plan.dtype, plan.device.type)
    ids = prompts(model, tokenizer, plan.tokens, 1, plan.rounds + plan.warmup)
    facts = environment(plan.device)
    target = out or _default_out(facts["device"], plan.quick)
    results: dict[str, Any] = {"format": record.FORMAT, "complete": False, "environment": facts}
    results |= {"settings": plan.settings, "tests": kernel_tests(plan.device, tests)}
    write_json(target, results)
    refused = results["tests"]["refused"]
    if refused is not None:
        errors.print(f"Nothing is timed: {refused}. Written to {target}.", markup=False)
        return 1
    for name, part in measurements(plan, facts, model, ids):
        results[name] = part
        write_json(target, results)
    write_json(target, {**results, "complete": True})
    console.print(f"Written to {target}.", markup=False)
    return int(any(case["refused"] is not None for case in results["operators"]))


def _default_out(device: str, quick: bool) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder = ROOT / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"gpu-{name}{'-quick' if quick else ''}.json"


def kernel_tests(device: torch.device, tests: Path) -> dict[str, Any]:
    """Counts and failures of the tests, where the Triton kernels ran, and why nothing is timed.

    Triton's interpreter is switched on for the CPU and off for a GPU. Raises GpuError where there
    are no tests.
    """
    if not tests.exists():
        raise GpuError(
            f"{tests} does not exist: the kernel tests are part of a checkout of the repository."
            " Run scripts/gpu in one."
        )
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device.type == "cpu" else "0"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        command.append(str(tests.absolute()))
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        root = ElementTree.parse(report).getroot() if report.is_file() else None
    found: dict[str, Any] = {"exit_status": status, **_read(root)}
    return {**found, "refused": _refused(found, device.type)}


def _read(report: ElementTree.Element | None) -> dict[str, Any]:
    """What a JUnit report says."""
    found: dict[str, Any] = {"ran_on": None, "passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for node in () if report is None else report.iter("property"):
        if node.get("name") == RAN_ON:
            found["ran_on"] = node.get("value")
    for case in () if report is None else report.iter("testcase"):
        wrong = [node for node in case if node.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        found["failed" if wrong else "skipped" if skipped else "passed"] += 1
        name = f"{case.get('classname')}::{case.get('name')}"
        found["failures"] += [f"{name}: {node.get('message')}" for node in wrong]
    return found


def _refused(found: dict[str, Any], device: str) -> str | None:
    """None, or why nothing may be timed after these tests."""
    if found["failed"]:
        return f"{found['failed']} kernel tests failed"
    if found["exit_status"] or not found["passed"]:
        return f"the kernel tests did not run: pytest ended with {found['exit_status']}"
    if found["ran_on"] != device:
        return f"no test ran a Triton kernel on {device}; is Triton installed?"
    return None


def measurements(
    plan: Plan, facts: dict[str, Any], model: Any, ids: torch.Tensor
) -> Iterator[tuple[str, Any]]:
    """Every part by name as it is ready, after its table."""
    numbers = plan.rounds, plan.warmup
    cases = operators.cases(quick=plan.quick, long=not plan.quick)
    outcomes = time_cases(cases, plan.device, *numbers)
    console.print(record.table(outcomes, facts))
    yield "operators", record.to_record(outcomes, facts, plan.settings)["cases"]
    for bench, policies, batches in (
        ("decode", POLICIES, plan.batches),
        ("prefill", PREFILL_POLICIES, [1]),
    ):
        rows = _speed(plan, facts, model, ids, grid.cells(bench, [plan.tokens], batches), policies)
        for sheet in benches.sheets_of(rows):
            console.print(table(sheet))
        yield bench, rows


def _speed(
    plan: Plan,
    facts: dict[str, Any],
    model: Any,
    ids: torch.Tensor,
    cells: Sequence[Cell],
    policies: Sequence[str],
) -> list[Row]:
    """The rows of some cells of a benchmark of time."""
    setting = Setting(
        model=plan.model,
        dtype=plan.dtype,
        device=plan.device.type,
        threads=torch.get_num_threads(),
        rounds=plan.rounds,
        warmup=plan.warmup,
    )
    measure = partial(benches.timed, setting, benches.LocalCandidates(), model, ids)
    return grid.fill(Journal(None), cells, (BASELINE, *policies), measure, setting, facts)


gpu.add_to(app)


def main() -> None:
    """The entry point: engine errors become one message and exit status 2."""
    try:
        app()
    except KVPressError as error:
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), highlight=False, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
