"""Keys of pages and their boxes for tests of retrieval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpress import ops
from kvpress.ops import RowPages

NAN, INF = float("nan"), float("inf")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BACKENDS = pytest.mark.parametrize("backend", ["operator", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)


def run_of(backend: str, name: str) -> Callable[..., Any]:
    """An operator as it is called, or its reference."""
    return getattr(ops, name) if backend == "operator" else ops.implementation(name, "reference")


def keys_of(kind: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Keys that make bounds hard to keep."""
    most = torch.finfo(dtype).max
    normal = torch.randn(shape)
    least = {FP32: 2.0**-149, BF16: 2.0**-133, FP16: 2.0**-24}[dtype]
    keys = {
        "normal": normal,
        "alike": torch.randn(*shape[:-2], 1, shape[-1]) + normal * 1e-3,
        "equal": torch.randn(*shape[:-2], 1, shape[-1]).expand(shape),
        "huge": normal.clamp(-1, 1) * most,
        "denormal": torch.randint(-9, 10, shape) * least,
        "zeros": torch.where(normal < 0, -0.0, 0.0),
        "mixed": normal * 10.0 ** torch.randint(-6, 5, shape),
    }
    return keys[kind].to(dtype).contiguous()


KINDS = ("normal", "alike", "equal", "huge", "denormal", "zeros", "mixed")


def boxes_and_keys(key_PSD: Tensor) -> Tensor:
    """Boxes of pages, then those of every key alone: `[P + P·S, 2, D]`."""
    box_P2D = torch.stack([key_PSD.amin(1), key_PSD.amax(1)], 1)
    alone_P2D = key_PSD.flatten(0, 1)[:, None].expand(-1, 2, -1)
    return torch.cat([box_P2D, alone_P2D]).contiguous()


def all_of(box_P2D: Tensor, rows: int = 1) -> RowPages:
    """A table of all pages for every row."""
    pages = len(box_P2D)
    table_RW = torch.arange(pages, dtype=torch.int32).repeat(rows, 1)
    return RowPages(table_RW, torch.full((rows,), pages))


def bounds_of(key_PSD: Tensor, value_PSE: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Boxes and lengths of pages of any number of slots, by the formulas of `page_bounds`."""
    box_P2D = torch.stack([key_PSD.amin(1), key_PSD.amax(1)], 1)
    value_PSE = key_PSD if value_PSE is None else value_PSE
    corner_P = box_P2D.double().abs().amax(1).norm(dim=1)
    longest_P = value_PSE.double().norm(dim=2).amax(1)
    return box_P2D, (torch.stack([corner_P, longest_P], 1) * (1 + 2**-14)).float()
