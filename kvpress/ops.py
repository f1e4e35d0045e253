"""The operators: schemas defined once, the reference as the default of every device.

Native backends register for their device beside the reference and take precedence with no code
here.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import threading
from typing import Any

import torch
from torch import Tensor

from kvpress import env
from kvpress.errors import KVPressError, did_you_mean

BACKENDS = ("reference",)
_LOCK = threading.Lock()


def names() -> list[str]:
    """The operators that exist: the folders of `kvpress.csrc`."""
    found = pkgutil.iter_modules(importlib.import_module("kvpress.csrc").__path__)
    return sorted(module.name for module in found if module.ispkg)


@functools.cache
def _library() -> torch.library.Library:
    """Defines every operator and registers its reference, once per process."""
    forced = env.backend()
    if forced is not None and forced not in BACKENDS:
        raise KVPressError(
            f"KVPRESS_BACKEND={forced!r} names no backend.{did_you_mean(forced, BACKENDS)}"
        )
    library = torch.library.Library("kvpress", "DEF")  # type: ignore[no-untyped-call]
    for name in names():
        schema = importlib.import_module(f"kvpress.csrc.{name}").SCHEMA
        library.define(schema)  # type: ignore[no-untyped-call]
        reference = getattr(importlib.import_module(f"kvpress.csrc.{name}.reference"), name)
        library.impl(  # type: ignore[no-untyped-call]
            name, reference, "CompositeExplicitAutograd"
        )
    return library


def _call(name: str, *args: Any) -> Any:
    with _LOCK:  # two threads must not define the operators twice
        _library()
    return getattr(torch.ops.kvpress, name)(*args)


def decode_rows(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of new queries over ragged paged rows; see csrc/decode_rows."""
    out, lse, weights = _call("decode_rows", *args)
    return out, lse, weights


def attention_sums(*args: Any) -> Tensor:
    """Column sums of a prompt's attention; see csrc/attention_sums."""
    sums: Tensor = _call("attention_sums", *args)
    return sums


def gather_slots(pool_PSX: Tensor, address_N: Tensor) -> Tensor:
    """Dense copies of slots; see csrc/gather_slots."""
    slots: Tensor = _call("gather_slots", pool_PSX, address_N)
    return slots
