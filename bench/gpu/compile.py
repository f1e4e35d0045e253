"""Ahead-of-time compilation of the GPU kernels, without a GPU: registers, spills, occupancy."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from kvpress.bench.gpu.launches import Launch, launches, specialise
from kvpress.csrc import triton_common
from kvpress.csrc.estimate_blocks import cuda_kernel
from rich.console import Console
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kvpress.errors import BackendError
from kvpress.ops import build_cuda
from kvpress.report.tables import Fitted, new_table

TARGETS = (80, 90, 100)
CUDA_TARGETS = (80, 86, 89, 90)  # of the sources for nvcc
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # of one SM
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of one SM
RESERVED_BYTES = 1 << 10  # of shared memory, by the driver for every block


@dataclass(frozen=True)
class Compiled:
    """What became of one launch on one target. Bytes; occupancy is the share of the SM's warps."""

    kernel: str
    target: str
    specialisation: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    occupancy: float


def compile_one(launch: Launch, target: int) -> Compiled:
    """Registers, spills and shared memory of one launch. Raises BackendError if ptxas fails."""
    source = ASTSource(launch.kernel, *specialise(launch))
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **triton_common.FUSED,
    }
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, spills = assemble(made.asm["ptx"], target)
    shared, warps = made.metadata.shared, made.metadata.num_warps
    return Compiled(
        f"{launch.operator}.{launch.kernel.__name__}",
        f"sm_{target}",
        launch.case,
        warps,
        launch.num_stages,
        registers,
        spills,
        shared,
        occupancy(registers, shared, warps, target),
    )


def assemble(ptx: str, target: int) -> tuple[int, int]:
    """Registers per thread and bytes of spill stores and loads."""
    name = re.search(r"\.target (\w+)", ptx)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(target).path, "-v", f"--gpu-name={name and name[1]}", file.name]
        done = subprocess.run(
            [*command, "-o", "/dev/null"], capture_output=True, text=True, check=False
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    if done.returncode or not registers or not spills:
        raise BackendError(f"ptxas failed for sm_{target}: {done.stderr.strip()}")
    return int(registers[1]), sum(map(int, spills))


def occupancy(registers: int, shared: int, warps: int, target: int) -> float:
    """The share of an SM's warps that can be resident, from registers, shared memory and limits."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out in units of 256
    by_registers = REGISTERS // per_warp // warps
    by_shared = SHARED_BYTES[target] // (shared + RESERVED_BYTES)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS


def versions() -> dict[str, str]:
    """Of Triton and of the assembler for every target."""
    found = {"triton": triton.__version__}
    for target in TARGETS:
        told = subprocess.run(
            [get_ptxas(target).path, "--version"], capture_output=True, text=True, check=True
        )
        release = re.search(r"release [\d.]+, V([\d.]+)", told.stdout)
        found[f"ptxas sm_{target}"] = release[1] if release else "unknown"
    return found


def show(results: list[Compiled], console: Console) -> None:
    """A table of all results, spills in red."""
    heads = ("warps", "stages", "registers", "spills", "shared", "occupancy")
    table = new_table(("kernel", "target", "specialisation"), heads)
    for r in results:
        spills = f"[red]{r.spill_bytes}[/red]" if r.spill_bytes else "0"
        numbers = (str(r.num_warps), str(r.num_stages), str(r.registers), spills)
        shared = f"{r.shared_bytes / 1024:.1f} KiB"
        table.add_row(r.kernel, r.target, r.specialisation, *numbers, shared, f"{r.occupancy:.0%}")
    console.print(Fitted(table))


def compile_cuda() -> list[dict[str, Any]]:
    """Registers and spills of the CUDA kernels for every target; empty without nvcc."""
    made = []
    for target in CUDA_TARGETS if build_cuda.compiler() else ():
        with tempfile.TemporaryDirectory() as folder:
            told = build_cuda.build(cuda_kernel.SOURCE, target, Path(folder) / "operator.so")
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", told)]
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", told)]
        numbers = {"registers": max(registers), "spill_bytes": sum(spills)}
        made.append({"source": cuda_kernel.SOURCE, "target": f"sm_{target}", **numbers})
    return made


def to_text(report: dict[str, Any]) -> str:
    """JSON with a line for each entry of each part."""
    parts = []
    for name, part in report.items():
        entries = part if isinstance(part, list) else [part]
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        parts.append(f' "{name}": [\n{lines}\n ]' if part is entries else f' "{name}":\n{lines}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """0 if nothing spills."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu-compile.json"))
    out: Path = parser.parse_args().out
    if triton_common.INTERPRETED:
        raise BackendError("TRITON_INTERPRET=1 leaves nothing to compile; unset it.")
    results = [compile_one(launch, target) for target in TARGETS for launch in launches(target)]
    results.sort(key=lambda r: (r.kernel, r.specialisation, int(r.target.removeprefix("sm_"))))
    show(results, Console())
    out.parent.mkdir(parents=True, exist_ok=True)
    cuda_made = compile_cuda()
    for one in cuda_made:
        Console().print(" ".join(f"{name} {value}" for name, value in one.items()))
    report = {
        "versions": versions(),
        "kernels": [asdict(result) for result in results],
        "cuda": cuda_made,
    }
    out.write_text(to_text(report), encoding="utf-8")
    spilling = sum(result.spill_bytes > 0 for result in results)
    spilling += sum(one["spill_bytes"] > 0 for one in cuda_made)
    Console().print(f"{len(results)} kernels compiled, {spilling} spill. Written to {out}.")
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
