"""What differs between versions of torch and transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def uncompiled(function: _F) -> _F:
    """The function, left out of what torch.compile traces, with everything that it calls.

    What happens to a cache depends on counts and tags on the host, which no graph can hold.
    """
    reason = (
        "kvpress: a compressed cache is kept by ordinary Python code between the compiled"
        " parts of a model, so one graph is impossible. Compile without fullgraph=True."
    )
    disable: Callable[..., _F] = torch.compiler.disable
    explains = "reason" in inspect.signature(disable).parameters  # older torch has none
    return disable(function, reason=reason) if explains else disable(function)
