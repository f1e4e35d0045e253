"""Tensors that outlive the call that made them, whatever mode that call ran in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def lasting(function: _F) -> _F:
    """The function, run outside inference mode.

    What is made under `torch.inference_mode()` can never be written to outside of it, but a cache
    that was filled there may be continued anywhere.
    """

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # the first one would turn gradients on
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]
