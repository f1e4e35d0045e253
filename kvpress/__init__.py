"""A KV-cache compression engine for Hugging Face models that really frees the bytes.

import kvpress
with kvpress.attach(model, "name:budget=0.5") as engine:
    model.generate(**inputs, max_new_tokens=100)
    print(engine.report().fraction)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

from kvpress.env import __version__
from kvpress.errors import (
    AttachError,
    BackendError,
    BudgetError,
    CacheError,
    CacheFileError,
    DeadlineError,
    ImportClashError,
    InputError,
    KVPressError,
    MaskError,
    OperatorError,
    PlanError,
    PolicyError,
    RefusedError,
    ServingError,
    TierError,
    TierIntegrityError,
    TierTimeoutError,
    TooLargeError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from kvpress.batching.batcher import Batcher
    from kvpress.batching.request import Sampling
    from kvpress.engine import Engine, attach, detach, engine_of
    from kvpress.hf.roles import spans_of
    from kvpress.policy.base import Policy
    from kvpress.policy.loading import load_policy
    from kvpress.policy.options import option

__all__ = [
    "AttachError",
    "BackendError",
    "Batcher",
    "BudgetError",
    "CacheError",
    "CacheFileError",
    "DeadlineError",
    "Engine",
    "ImportClashError",
    "InputError",
    "KVPressError",
    "MaskError",
    "OperatorError",
    "PlanError",
    "Policy",
    "PolicyError",
    "RefusedError",
    "Sampling",
    "ServingError",
    "TierError",
    "TierIntegrityError",
    "TierTimeoutError",
    "TooLargeError",
    "UnsupportedModelError",
    "__version__",
    "attach",
    "detach",
    "engine_of",
    "load_policy",
    "option",
    "spans_of",
]

_HOMES = {
    "Batcher": "batching.batcher",
    "Sampling": "batching.request",
    "attach": "engine",
    "detach": "engine",
    "engine_of": "engine",
    "Engine": "engine",
    "Policy": "policy.base",
    "load_policy": "policy.loading",
    "option": "policy.options",
    "spans_of": "hf.roles",
}


def _check_clash() -> None:
    """Raises ImportClashError if the other distribution of this import name is installed too."""
    try:
        importlib.metadata.distribution("kvpress")
        installed = True
    except importlib.metadata.PackageNotFoundError:
        installed = importlib.util.find_spec("kvpress.presses") is not None
    if installed:
        raise ImportClashError(
            "Two distributions own the import name 'kvpress' here: this one (kvpress-engine) and"
            " the one named 'kvpress'. One has overwritten files of the other. Run: pip uninstall"
            " -y kvpress kvpress-engine; then install only the one you want, or put each into a"
            " virtual environment of its own."
        )


_check_clash()


def __getattr__(name: str) -> Any:
    # Lazy, so that `kvpress policies` and `kvpress info` do not wait for transformers.
    if name not in _HOMES:
        raise AttributeError(f"module 'kvpress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kvpress.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
