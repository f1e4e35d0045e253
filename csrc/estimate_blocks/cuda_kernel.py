"""`estimate_blocks` on tensor cores with 4-bit products: sm_80 to sm_89.

Other architectures have none: from sm_90 on they are emulated in software. There Triton multiplies
bytes, which is what this raises an error for.
"""

from __future__ import annotations

import ctypes

import torch
from kvpress.csrc.estimate_blocks import Operands
from kvpress.csrc.estimate_blocks.reference import HIGH, check
from kvpress.csrc.triton_common import architecture, device_of
from torch import Tensor

from kvpress.formulas.block_map import MOST_CODE, Blocks
from kvpress.ops import build_cuda, shapes

SOURCE = "estimate_blocks/cuda/kernel.cu"
CHANNELS = 64  # of one product
NATIVE = range(80, 90)  # architectures with 4-bit products


def available(query_BNQD: Tensor) -> bool:
    """Whether the tensor's device has 4-bit products, and nvcc is there to compile for it."""
    if not query_BNQD.is_cuda or build_cuda.compiler() is None:
        return False
    return architecture(query_BNQD.device.index) in NATIVE


def packed(code_BNQD: Tensor) -> Tensor:
    """Two codes per byte, the first in the lower bits: uint8 `[B, N, Q, W]`, zeros beyond D."""
    padded = torch.nn.functional.pad(code_BNQD, (0, -code_BNQD.shape[-1] % CHANNELS))
    low, high = padded[..., 0::2].to(torch.uint8), padded[..., 1::2].to(torch.uint8)
    return (low & 15) | (high << 4)


def estimate_blocks(operands: Operands) -> Tensor:
    """The same as the reference, to the bit. Raises OperatorError and BackendError."""
    check(operands)
    query_BNQD, query_scale_BNQ, key_BHSD, key_scale_BHJ4 = operands[:4]
    shift_BNS, threshold_BNQ, local = operands[4:]
    index = query_BNQD.device.index if query_BNQD.is_cuda else -1
    if not query_BNQD.is_cuda or architecture(index) not in NATIVE:
        shapes.refuse(
            "estimate_blocks",
            f"4-bit products exist on sm_80 to sm_89; this is {query_BNQD.device}"
            + (f" (sm_{architecture(index)})" if query_BNQD.is_cuda else ""),
        )
    run = build_cuda.library(SOURCE, architecture(index)).kvpress_estimate_blocks
    batch, heads, queries, width = query_BNQD.shape
    slots, device = key_BHSD.shape[2], query_BNQD.device
    blocks = Blocks(queries, slots)
    offsets = blocks.offsets
    map_BNX = torch.empty(batch, heads, offsets[-1], dtype=torch.uint8, device=device)
    tensors = (
        packed(query_BNQD), packed(key_BHSD), query_scale_BNQ, key_scale_BHJ4, shift_BNS,
        threshold_BNQ, *blocks.tables(local, device), map_BNX,
    )  # fmt: skip
    sizes = (
        queries, slots, blocks.columns, offsets[-1], blocks.rows, batch * heads,
        heads // key_BHSD.shape[1], width,
    )  # fmt: skip
    with device_of(query_BNQD):
        failed = run(
            *(ctypes.c_void_p(x.data_ptr()) for x in tensors),
            *map(ctypes.c_int64, sizes),
            ctypes.c_float(HIGH - MOST_CODE**2 * width - 1),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
    if failed:
        shapes.refuse("estimate_blocks", f"the launch failed with CUDA error {failed}")
    return map_BNX
