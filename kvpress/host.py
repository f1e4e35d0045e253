"""Tensors on the host, whatever modes and defaults the process has: int64 unless named.

`torch.set_default_device` and `torch.set_default_dtype` decide for calls that name neither,
`torch.inference_mode` for what is made inside of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


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


def lasting(function: _F) -> _F:
    """The function, run outside inference mode.

    What is made under `torch.inference_mode()` can never be written to outside of it, but a cache
    that was filled there may be continued anywhere.
    """

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        # What torch.inference_mode(False) does, at a fifth of its cost: steps of layers pass here.
        guard = torch._C._InferenceMode(False)
        guard.__enter__()  # type: ignore[no-untyped-call]
        try:
            torch._C._set_grad_enabled(False)  # leaving the mode turned gradients on
            return function(*args, **kwargs)
        finally:
            guard.__exit__(None, None, None)  # puts both back

    return outside  # type: ignore[return-value]
