"""Tensors on the host, whatever the defaults of the process are: whole numbers unless named.

`torch.set_default_device` and `torch.set_default_dtype` decide for calls that name neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def arange(*bounds: int) -> Tensor:
    """`torch.arange`: int64."""
    return torch.arange(*bounds, dtype=torch.int64, device="cpu")


def zeros(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """`torch.zeros`."""
    return torch.zeros(sizes, dtype=dtype, device="cpu")


def full(sizes: tuple[int, ...], value: float, dtype: torch.dtype = torch.int64) -> Tensor:
    """`torch.full`."""
    return torch.full(sizes, value, dtype=dtype, device="cpu")


def tensor(values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    """`torch.tensor`, of numbers or nested lists of them."""
    return torch.tensor(values, dtype=dtype, device="cpu")
