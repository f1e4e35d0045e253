"""The CUDA sources: they compile where nvcc is, and what the host can check of them is right."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from blocking import estimate_operands, operands
from kvpress.csrc.estimate_blocks import Operands, cuda_kernel

from kvpress.errors import OperatorError
from kvpress.ops import build_cuda
from kvpress.ops.build_cpu import sources
from kvpress.ops.registry import implementation

NVCC = pytest.mark.skipif(build_cuda.compiler() is None, reason="no nvcc here")
COMPILER = shutil.which("c++")
WARP = Path(__file__).parents[1] / "tools" / "warp.cpp"


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
@pytest.mark.parametrize("as_bytes", [False, True])
def test_fragments_hold_what_is_multiplied(tmp_path: Path, as_bytes: bool) -> None:
    made = tmp_path / "warp.so"
    folder = sources() / "estimate_blocks" / "cuda"
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", f"-I{folder}", str(WARP)]
    subprocess.run([*command, "-o", str(made)], check=True)
    query, key = (torch.randint(-7, 8, (1, 1, n, 64), dtype=torch.int8) for n in (16, 8))
    query[0, 0, 0], key[0, 0, 0] = 7, -7
    packed = [cuda_kernel.packed(x).contiguous() for x in (query, key)]
    out = torch.zeros(16, 8, dtype=torch.int32)
    ctypes.CDLL(str(made)).multiply(
        *(ctypes.c_void_p(x.data_ptr()) for x in packed),
        ctypes.c_int64(8),
        int(as_bytes),
        ctypes.c_void_p(out.data_ptr()),
    )
    wanted = query[0, 0].int() @ key[0, 0].int().T
    assert torch.equal(out, wanted * 256 if as_bytes else wanted)
    assert out[0, 0] == -49 * 64 * (256 if as_bytes else 1)


@pytest.mark.parametrize("width", [7, 64, 80, 128])
def test_codes_are_packed_in_order(width: int) -> None:
    code = torch.randint(-7, 8, (1, 2, 3, width), dtype=torch.int8)
    packed = cuda_kernel.packed(code).int()
    assert packed.shape[-1] * 2 == -(-width // 64) * 64
    both = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    signed = torch.where(both > 7, both - 16, both)
    assert torch.equal(signed[..., :width], code.int()) and not signed[..., width:].any()


@NVCC
@pytest.mark.parametrize("target", [80, 86, 89, 90])
def test_it_compiles_without_spills(
    tmp_path: Path, target: int, record_property: pytest.RecordProperty
) -> None:
    told = build_cuda.build(cuda_kernel.SOURCE, target, tmp_path / "operator.so")
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", told)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", told)]
    record_property(f"registers sm_{target}", registers)
    assert len(registers) == 4 and not any(spills) and max(registers) <= 168


def test_other_devices_are_refused() -> None:
    query, key, _ = operands(1, 2, 1, 100, 100, 16)
    assert not cuda_kernel.available(query)
    with pytest.raises(OperatorError, match="sm_80 to sm_89"):
        cuda_kernel.estimate_blocks(Operands(*estimate_operands(query, key, 0.1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_maps_equal_the_reference_bit_for_bit() -> None:
    reference = implementation("estimate_blocks", "reference")
    if not cuda_kernel.available(torch.empty(0, device="cuda")):
        pytest.skip("no 4-bit products here, or no nvcc")
    for shape in ((1, 2, 1, 1, 1, 64), (2, 4, 2, 130, 500, 80), (1, 2, 2, 700, 900, 128)):
        query, key, _ = (x.cuda() for x in operands(*shape))
        for tau in (0.0, 0.3, float("inf")):
            given = estimate_operands(query, key, tau)
            made = cuda_kernel.estimate_blocks(Operands(*given))
            assert torch.equal(made, reference(*given))
