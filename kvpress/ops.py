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
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvpress import env, native, versions
from kvpress.errors import BackendError, KVPressError, OperatorError, did_you_mean

BACKENDS = ("reference", "cpu", "triton")
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
            name, implementation(name, "reference"), "CompositeExplicitAutograd"
        )
        torch.library.register_fake(f"kvpress::{name}", module.fake, lib=library)
    return library


@functools.cache
def _native() -> str:
    """The backend of CPU tensors, once per process: a build that failed is not tried again."""
    try:
        library = native.build()
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
    return native.instruction_set(native.build()) if backends()["cpu"] == "cpu" else ""


@functools.cache
def _warn() -> None:
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
    for name in names():
        _define().impl(name, implementation(name, "triton_kernel"), key)  # type: ignore[no-untyped-call]
    return {device: "triton"}


def implementation(name: str, kind: str) -> Any:
    """The Python function of an operator: `kind` is `reference` or `triton_kernel`."""
    return getattr(importlib.import_module(f"kvpress.csrc.{name}.{kind}"), name)


@functools.cache
def _operator(name: str) -> Any:
    _warn()
    return getattr(torch.ops.kvpress, name).default


def _call(name: str, *args: Any) -> Any:
    """Runs an operator. Raises OperatorError for operands that it refuses, on every backend."""
    try:
        return _operator(name)(*args)
    except RuntimeError as error:
        _refused(name, error)


def _refused(name: str, error: RuntimeError) -> NoReturn:
    """Raises OperatorError for what an operator said of its operands; other errors as they are."""
    message, own = str(error), f"kvpress::{name}"
    if isinstance(error, KVPressError) or own not in message:
        raise error
    raise OperatorError(message[message.index(own) :].splitlines()[0]) from None


def decode_rows(
    *args: Any, old: Sequence[Tensor] = (), layouts: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of new queries over ragged paged rows; see csrc/decode_rows."""
    out, lse, weights = _call("decode_rows", *args, old, layouts)
    return out, lse, weights


def decode_step(*args: Any, old: Sequence[Tensor] = (), layouts: Sequence[int] = ()) -> Tensor:
    """Append, attend, observe and evict in one call; see csrc/decode_step."""
    try:  # as `_call`, without another copy of the operands: this is the decode loop
        out: Tensor = _operator("decode_step")(*args, old, layouts)
    except RuntimeError as error:
        _refused("decode_step", error)
    return out


def absorb_step(*args: Any) -> None:
    """Evict one slot of rows above their quotas and merge it; see csrc/absorb_step."""
    _call("absorb_step", *args)


def attend_blocks(*args: Any) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of a bit map, and its LSE; see csrc/attend_blocks."""
    out, lse = _call("attend_blocks", *args)
    return out, lse


def attend_sums(*args: Any) -> tuple[Tensor, Tensor]:
    """Attention of a prompt and its column sums; see csrc/attend_sums."""
    out, sums = _call("attend_sums", *args)
    return out, sums


def attention_sums(*args: Any) -> Tensor:
    """Column sums of a prompt's attention; see csrc/attention_sums."""
    sums: Tensor = _call("attention_sums", *args)
    return sums


def match_keys(
    evicted_BHED: Tensor, kept_BHCD: Tensor, allowed_BHC: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosine and index of the nearest kept key of every evicted key; see csrc/match_keys."""
    similarity, target = _call("match_keys", evicted_BHED, kept_BHCD, allowed_BHC)
    return similarity, target


def pack(*args: Any) -> Tensor:
    """Whole pages of old slots: kept channels, quantised; see csrc/pack."""
    pages: Tensor = _call("pack", *args)
    return pages


def unpack(*args: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of whole pages of old slots; see csrc/unpack."""
    key, value = _call("unpack", *args)
    return key, value


def channel_scores(query_BNWD: Tensor, key_BHSD: Tensor, held_BHS: Tensor) -> Tensor:
    """How much each key channel contributes to the logits of queries; see csrc/channel_scores."""
    scores: Tensor = _call("channel_scores", query_BNWD, key_BHSD, held_BHS)
    return scores


def estimate_blocks(*args: Any) -> Tensor:
    """The bit map of blocks that matter, from 4-bit codes; see csrc/estimate_blocks."""
    computed: Tensor = _call("estimate_blocks", *args)
    return computed


def gather_slots(pool_PX: Tensor, address_N: Tensor, slot_last: bool = False) -> Tensor:
    """Dense copies of slots; see csrc/gather_slots."""
    slots: Tensor = _call("gather_slots", pool_PX, address_N, slot_last)
    return slots


def scatter_slots(
    pool_PX: Tensor, address_N: Tensor, slots_NX: Tensor, slot_last: bool = False
) -> None:
    """Writes slots into a pool; see csrc/scatter_slots."""
    _call("scatter_slots", pool_PX, address_N, slots_NX, slot_last)
