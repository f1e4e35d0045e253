"""What the machine can do at best: bytes read per second and multiplications per second.

Probes do the work of an operator's case with PyTorch's own code and the same threads, so that the
share of the probe that an operator reaches says how much is left to gain.
"""

from __future__ import annotations

import math

import torch
from kvpress.bench.common.timing import Call

# All copies of one candidate together: four times a last-level cache of 64 MiB.
ROTATION = 256 << 20


def copies(size: int, rotation: int = ROTATION) -> int:
    """How many copies of `size` bytes fill `rotation` bytes: at least one.

    A call that takes the next copy each time then finds none of it in the caches.
    """
    return max(1, -(-rotation // max(1, size)))


def memory(size: int, device: torch.device, rotation: int = ROTATION) -> Call:
    """A call that moves `size` bytes: a sum on the CPU, a copy elsewhere (read and written)."""
    # Ones, not zeros: pages that were never written share one physical page, which stays cached.
    buffers = [
        torch.ones(max(1, size // 4), dtype=torch.float32, device=device)
        for _ in range(copies(size, rotation))
    ]
    if device.type == "cpu":
        return lambda number: buffers[number % len(buffers)].sum()

    def copy(number: int) -> None:
        buffer = buffers[number % len(buffers)]
        half = len(buffer) // 2
        buffer[:half].copy_(buffer[half : 2 * half])

    return copy


def side(flops: int) -> int:
    """The side of the square matrices whose product takes about `flops` operations (2·side³)."""
    return max(1, round(math.pow(flops / 2, 1 / 3)))


def matmul(flops: int, dtype: torch.dtype, device: torch.device) -> Call:
    """A call that multiplies square matrices of `side(flops)`: 2·side³ operations."""
    left = torch.rand(side(flops), side(flops), device=device).to(dtype)
    right = torch.rand(side(flops), side(flops), device=device).to(dtype)
    return lambda number: left @ right
