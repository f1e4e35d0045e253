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
        # What torch.inference_mode(False) does, at a fifth of its cost: steps of layers pass here.
        guard = torch._C._InferenceMode(False)
        guard.__enter__()  # type: ignore[no-untyped-call]
        try:
            torch._C._set_grad_enabled(False)  # leaving the mode turned gradients on
            return function(*args, **kwargs)
        finally:
            guard.__exit__(None, None, None)  # puts both back

    return outside  # type: ignore[return-value]
