"""The operators: schemas defined once, the reference as the default of every device.

A native backend registers for its device beside the reference and takes precedence: `cpu` for CPU
tensors where a compiler is found, `triton` for CUDA tensors where Triton can be imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import pkgutil
import threading
from collections.abc import Callable
from typing import Any, cast

import torch

from kvpress import env
from kvpress.errors import BackendError, KVPressError, did_you_mean
from kvpress.ops import build_cpu, versions
from kvpress.ops.operands import grouped, leaves

BACKENDS = ("reference", "cpu", "triton")
_MOST_OF_KERNELS = 256  # channels of a head
_LOCK = threading.RLock()
_LOG = logging.getLogger("kvpress")


def names() -> list[str]:
    """The operators that exist: the folders of `kvpress.csrc` that hold a schema."""
    found = pkgutil.iter_modules(importlib.import_module("kvpress.csrc").__path__)
    return sorted(module.name for module in found if module.ispkg)


def backends() -> dict[str, str]:
    """Device type -> the backend that answers there, with the reason where it is the reference.

    The first call defines the operators and may compile the native ones. Raises BackendError if
    `KVPRESS_BACKEND` forces one that cannot run.
    """
    with _LOCK:  # two threads must not register the operators twice
        return _load()


@functools.cache
def _load() -> dict[str, str]:
    forced = env.backend()
    if forced is not None and forced not in BACKENDS:
        raise KVPressError(
            f"KVPRESS_BACKEND={forced!r} names no backend.{did_you_mean(forced, BACKENDS)}"
        )
    env.check_instruction_set()
    _define()
    chosen = {"cpu": "reference", "cuda": "reference"}
    if forced in (None, "cpu"):
        chosen["cpu"] = _native()
        if forced and chosen["cpu"] != "cpu":
            raise BackendError(f"KVPRESS_BACKEND=cpu cannot run: {reason_of(chosen['cpu'])}")
    if forced in (None, "triton"):
        chosen |= _triton(forced)
    for device, backend in chosen.items():
        _LOG.info("operators on %s: %s", device, backend)
    return chosen


@functools.cache
def _define() -> torch.library.Library:
    """Defines every operator with its reference, once per process."""
    library = torch.library.Library("kvpress", "DEF")  # type: ignore[no-untyped-call]
    for name in names():
        module = importlib.import_module(f"kvpress.csrc.{name}")
        library.define(module.SCHEMA)  # type: ignore[no-untyped-call]
        library.impl(  # type: ignore[no-untyped-call]
            name, _of_flat(name, _function(name, "reference")), "CompositeExplicitAutograd"
        )
        torch.library.register_fake(f"kvpress::{name}", _of_flat(name, module.fake), lib=library)
    return library


@functools.cache
def _native() -> str:
    """The backend of CPU tensors, once per process: a build that failed is not tried again."""
    try:
        library = build_cpu.build()
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            raise BackendError(
                f"{library} cannot be loaded: {error}. Remove it, or set KVPRESS_CACHE to a folder"
                " from which programs may be run."
            ) from error
    except BackendError as error:
        return f"reference: {error}"
    return "cpu"


def has_triton(name: str) -> bool:
    """Whether an operator has a Triton kernel: those of files, trees and host memory do not."""
    return importlib.util.find_spec(f"kvpress.csrc.{name}.triton_kernel") is not None


def reason_of(backend: str) -> str:
    """Why a backend is the reference; empty where that was asked for, or where it is not."""
    return backend.partition(": ")[2]


def refuse_settings() -> None:
    """Raises KVPressError, or BackendError, if an environment variable forces what cannot run."""
    env.check_instruction_set()
    if env.backend() is not None:
        backends()


def instruction_set() -> str:
    """What the CPU operators are made of on this processor; empty where the references run."""
    return build_cpu.instruction_set(build_cpu.build()) if backends()["cpu"] == "cpu" else ""


@functools.cache
def warn() -> None:
    """Says, once per process, that the CPU operators are missing, or which version is unproven."""
    reason = reason_of(backends()["cpu"])
    if reason:
        _LOG.warning("The CPU operators run as PyTorch references: %s", reason)
    versions.warn()


def _triton(forced: str | None) -> dict[str, str]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    reason = ""
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed: pip install triton."
    elif not interpreted and not torch.cuda.is_available():
        reason = "there is no CUDA device, and TRITON_INTERPRET=1 is not set."
    if reason:
        if forced:
            raise BackendError(f"KVPRESS_BACKEND=triton cannot run: {reason}")
        return {"cuda": f"reference: {reason}"}
    if interpreted and not forced:
        return {}
    key, device = ("CPU", "cpu") if interpreted else ("CUDA", "cuda")
    for name in filter(has_triton, names()):
        kernel = _of_flat(name, _function(name, "triton_kernel"), _function(name, "reference"))
        _define().impl(name, kernel, key)  # type: ignore[no-untyped-call]
    return {device: "triton"}


def implementation(name: str, kind: str) -> Callable[..., Any]:
    """The Python function of an operator, called as the operator is.

    kind: `reference` or `triton_kernel`.
    """
    form, run = operands_of(name), _function(name, kind)
    return lambda *operands, **named: run(form(*operands, **named))


@functools.cache
def operands_of(name: str) -> Callable[..., tuple[Any, ...]]:
    """The named tuple of an operator's operands."""
    form: Callable[..., tuple[Any, ...]]
    form = importlib.import_module(f"kvpress.csrc.{name}").Operands
    return form


def _function(name: str, kind: str) -> Callable[[Any], Any]:
    run: Callable[[Any], Any]
    run = getattr(importlib.import_module(f"kvpress.csrc.{name}.{kind}"), name)
    return run


def _of_flat(
    name: str, run: Callable[[Any], Any], wider: Callable[[Any], Any] | None = None
) -> Callable[..., Any]:
    """The same, for PyTorch, which has no groups of operands.

    wider: what runs for heads of more channels than kernels have launch parameters for.
    """
    form = operands_of(name)
    if wider is None:
        return lambda *values: run(grouped(form, values))
    letters = [operand.rpartition("_")[2] for operand in leaves(cast(type, form))]
    widths = [(i, x.index(d)) for i, x in enumerate(letters) for d in "DE" if d in x]

    def fitting(*values: Any) -> Any:
        fits = all(values[i] is None or values[i].shape[d] <= _MOST_OF_KERNELS for i, d in widths)
        return (run if fits else wider)(grouped(form, values))

    return fitting
