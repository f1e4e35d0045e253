"""Ahead-of-time compilation of the GPU kernels, without a GPU: registers, spills, occupancy.

The operators run on small CPU tensors with launching replaced by recording, so that what is
compiled is what would be launched: the same argument types, constants and launch parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from kvpress.csrc import triton_common
from kvpress.csrc.estimate_blocks import cuda_kernel
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kvpress import ops
from kvpress.errors import BackendError
from kvpress.formulas.block_map import GROUPS, Blocks
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import build_cuda

TARGETS = (80, 90, 100)
CUDA_TARGETS = (80, 86, 89, 90)  # of the sources for nvcc
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # of one SM
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of one SM
RESERVED_BYTES = 1 << 10  # of shared memory, by the driver for every block
WIDTHS, DTYPES = (64, 128, 256), {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched."""

    operator: str
    kernel: Any
    case: str
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


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


def launches(target: int) -> list[Launch]:
    """The kernels of every operator with the launch parameters of an architecture."""
    found: list[Launch] = []
    with mock.patch.object(triton_common, "architecture", lambda index: target):
        for width, (name, dtype) in itertools.product(WIDTHS, DTYPES.items()):
            for operator, case, args in operands(width, dtype):
                label = " ".join(filter(None, (f"{name} D={width}", case)))
                with recorded(label, found):
                    ops.implementation(operator, "triton_kernel")(*args)
    unique = {_key(launch): launch for launch in reversed(found)}
    return sorted(unique.values(), key=lambda launch: (launch.operator, launch.kernel.__name__))


@contextlib.contextmanager
def recorded(case: str, into: list[Launch]) -> Iterator[None]:
    """Kernels are not launched inside, but listed."""

    def record(kernel: Any, *args: Any, **options: Any) -> None:
        numbers = {name: options.pop(name, 3) for name in ("num_warps", "num_stages")}
        given = {n: v for n, v in options.items() if n in kernel.arg_names}
        given.update(zip(kernel.arg_names, args, strict=False))
        home = kernel.fn.__module__.split(".")[-2]  # operators share kernels
        into.append(Launch(home, kernel, case, given, **numbers))

    with mock.patch.object(JITFunction, "run", record):
        yield


def operands(width: int, dtype: torch.dtype) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(operator, what is special, arguments) for sequences of 2, KV heads of 2 and groups of 4."""
    table, page = torch.zeros(4, 16, dtype=torch.int32), 16
    key, value = torch.zeros(1, width, page, dtype=dtype), torch.zeros(1, page, width, dtype=dtype)
    counts, batch = torch.full((4,), 16), torch.full((2,), 99)
    query, token = (
        torch.zeros(2, 8, 1, width, dtype=dtype),
        torch.zeros(2, 2, 1, width, dtype=dtype),
    )
    pages = (key, value, table, counts)
    yield "decode_rows", "", (query, *pages, 0.1, 0.0, True)
    yield "decode_rows", "softcap Q=32", (query.expand(-1, -1, 32, -1), *pages, 0.1, 50.0, True)
    yield from packed_operands(query, pages)
    marks = (torch.zeros(1, page, dtype=torch.int32), torch.zeros(1, page))
    for noise in triton_common.NOISES:
        state = (key, value, *marks, table, counts, batch, counts, batch, 4, True, "mass_per_age")
        numbers = (noise, 1.0, 7, 3, 0.1, 0.0)
        yield "decode_step", noise, (query, token, token, *state, *numbers)
        prompt = torch.zeros(2, 8, 160, width, dtype=dtype)
        position = torch.arange(160).repeat(2, 2, 1)
        scales = (0.1, 0.0, 160, noise, 1.0, 7, 3)
        yield "attention_sums", noise, (prompt, prompt[:, :2], position, *scales)
    store = (key, value, *marks, table, counts, batch, counts, batch, 4, "mass", torch.zeros(2))
    for case, pairs, counted in (
        ("", 0, False),
        ("turned", width // 4, False),
        ("counted", 0, True),
    ):
        turning = (torch.zeros(pairs) if pairs else None, False, 0, width - counted)
        rule = (2.7, 0.3, 0.7, True, True, False, True, False, counted)
        yield "absorb_step", case, (*store, *turning, *rule)
    allowed = torch.ones(2, 2, 160, dtype=torch.bool)
    yield from block_operands(prompt)
    yield "match_keys", "", (prompt[:, 2:4], prompt[:, :2], allowed)
    for pool, last in ((key, True), (value, False)):
        dense = torch.zeros(16, width, dtype=dtype)
        kind = "channel-major" if last else "slot-major"
        yield "gather_slots", kind, (pool, torch.arange(16), last)
        yield "scatter_slots", f"{kind} scatter", (pool, torch.arange(16), dense, last)


def block_operands(prompt: torch.Tensor) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """The operators of block-sparse prompts."""
    batch, heads, tokens, _ = prompt.shape
    blocks, codes = Blocks(tokens, tokens), prompt.to(torch.int8)
    numbers = torch.ones(batch, heads, tokens)
    scales = torch.ones(batch, 2, blocks.columns, GROUPS)
    yield (
        "estimate_blocks",
        "",
        (codes, numbers, codes[:, :2].clone(), scales, numbers, numbers, 32),
    )
    bits = torch.zeros(batch, heads, blocks.offsets[-1], dtype=torch.uint8)
    position = torch.arange(tokens).repeat(batch, 2, 1)
    sums = (0.1, 0.0, tokens, "fresh", 1.0, 7, 3, bits)
    yield "attention_sums", "fresh, mapped", (prompt, prompt[:, :2], position, *sums)
    yield "attend_blocks", "", (prompt, prompt[:, :2], prompt[:, :2], bits, 0.1)
    yield "attend_blocks", "LSE", (prompt, prompt[:, :2], prompt[:, :2, :, :0], bits, 0.1)


def packed_operands(
    query: torch.Tensor, pages: tuple[torch.Tensor, ...]
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """The operators on old slots: channels and 4 bits, and channels alone."""
    key, _, table, counts = pages
    width, none = query.shape[3], torch.empty(0)
    dense = torch.zeros(1, 64, width, dtype=key.dtype)
    held = torch.ones(2, 2, 64, dtype=torch.bool)
    prompt = torch.zeros(2, 8, 64, width, dtype=key.dtype)
    yield "channel_scores", "", (prompt, prompt[:, :2], held)
    for bits in (4, 16):
        kept = width * 5 // 8
        sizes = (64, width, width, kept, width, bits, bits, 64, 64, key.element_size())
        layout, case = PageLayout(*sizes), f"{bits} bits"
        channels = [torch.zeros(1, n, dtype=torch.int16) for n in (kept, width)]
        yield "pack", case, (dense, dense, *channels, list(layout))
        packed = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
        yield "unpack", case, (packed, *channels, list(layout), key)
        own = [x.expand(4, -1).contiguous() for x in channels]
        holes = torch.zeros(1, 64, dtype=torch.int32)
        old = [packed, *own, table[:, :1].contiguous(), counts * 4, holes, none, none.long()]
        yield "decode_rows", case, (query, *pages, 0.1, 0.0, True, old, list(layout))


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


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and attributes of a launch, as Triton derives them from arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(
        zip(launch.kernel.arg_names, launch.kernel.params, strict=True)
    ):
        given = launch.arguments[name]
        kind = "constexpr" if parameter.is_constexpr else _kind(given, parameter)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = given
            continue
        number = given.data_ptr() if isinstance(given, torch.Tensor) else given
        special = isinstance(number, int) and not parameter.do_not_specialize
        if special and number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _kind(given: Any, parameter: Any) -> str:
    if isinstance(given, torch.Tensor):
        return "*" + _NAMES[given.dtype]
    if isinstance(given, float):
        return "fp32"
    if given == 1 and not parameter.do_not_specialize:
        return "constexpr"
    return "i32" if -(2**31) <= given < 2**31 else "i64"


def _key(launch: Launch) -> str:
    return repr((launch.kernel.__name__, specialise(launch), launch.num_warps, launch.num_stages))


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
    table = Table("kernel", "target", "specialisation")
    for head in ("warps", "stages", "registers", "spills", "shared", "occupancy"):
        table.add_column(head, justify="right")
    for r in results:
        spills = f"[red]{r.spill_bytes}[/red]" if r.spill_bytes else "0"
        numbers = (str(r.num_warps), str(r.num_stages), str(r.registers), spills)
        shared = f"{r.shared_bytes / 1024:.1f} KiB"
        table.add_row(r.kernel, r.target, r.specialisation, *numbers, shared, f"{r.occupancy:.0%}")
    console.print(table)


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
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    spilling = sum(result.spill_bytes > 0 for result in results)
    spilling += sum(one["spill_bytes"] > 0 for one in cuda_made)
    Console().print(f"{len(results)} kernels compiled, {spilling} spill. Written to {out}.")
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
