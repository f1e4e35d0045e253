"""What comes of a call of an operator: results and operands, or a refusal; how two compare."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import calls
import torch
from kvpress.csrc.decode_rows.reference import check_parts
from kvpress.csrc.decode_step import reference as step_reference

from kvpress.errors import OperatorError
from kvpress.ops import shapes
from kvpress.ops.registry import implementation


def reference(name: str) -> Any:
    return step_over_old if name == "decode_step" else implementation(name, "reference")


def outcome(run: Any, call: calls.Call) -> Any:
    """The results and the operands after a call, or its refusal."""
    call = copy.deepcopy({k: v.detach() if is_leaf(v) else v for k, v in call.items()})
    args = list(call.values())
    keywords = {name: call[name] for name in ("old", "layouts") if name in call}
    args = [x for name, x in call.items() if name not in keywords]
    try:
        results = run(*args, **keywords)
    except OperatorError as error:
        return error
    if isinstance(results, Attended):
        return results
    return results, [x for x in call.values() if isinstance(x, torch.Tensor)]


def is_leaf(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def step_over_old(*args: Any, old: list[torch.Tensor], layouts: list[int]) -> Any:
    """The reference of `decode_step`, which takes no old slots; their attention is added here."""
    step = implementation("decode_step", "reference")
    if not old and not layouts:
        return step(*args)
    query, _, _, key, value, _, mass, table, counts = args[:9]
    sink, evict, *choices, scaling, softcap = args[12:]
    rank, noise, tau, *_ = choices
    step_reference.check(*args[:12])
    step_reference.check_choices(rank, noise, tau, scaling, softcap, evict and mass is None)
    shapes.ages("decode_step", args[9], args[11], sink, 1)
    parts = check_parts("decode_step", old, layouts, query, key, value, table)
    for _, (pages, *_, position, its_mass, dropped) in parts:
        needed = [position, its_mass] if mass is not None else []
        needed += [position, dropped] if evict else []
        if len(pages) and not all(x.numel() for x in needed):
            shapes.refuse("decode_step", "old slots lack what eviction needs")
    written = {f"{i}": x for i, x in enumerate(old) if i % 8 > 4}
    named = {f"old {i}": x for i, x in enumerate(old) if i % 8 <= 4} | written
    named |= {f"operand {i}": x for i, x in enumerate(args[:12]) if x is not None}
    own = {f"operand {i}" for i in (3, 4, 5, 6, 8)}
    shapes.apart("decode_step", named, {*written, *own})
    step(*args[:6], None, *args[7:13], False, "position", *args[15:])
    rows = (query, key, value, table, counts, scaling, softcap, False, old, layouts)
    return Attended(implementation("decode_rows", "reference")(*rows)[0])


class Attended(NamedTuple):
    """An output alone: what became of the slots is not known."""

    out: torch.Tensor


def compare(given: Any, wanted: Any, what: str) -> None:
    if isinstance(given, OperatorError) or isinstance(wanted, OperatorError):
        assert isinstance(given, OperatorError), f"{what}: accepted, but {wanted}"
        assert isinstance(wanted, OperatorError), f"{what}: {given}, but the reference accepts it"
        return
    if isinstance(wanted, Attended):
        given, wanted = given[0], wanted.out
    pairs = list(zip(flat(given), flat(wanted), strict=True))
    for one, other in pairs:
        assert close(one, other), f"{what}: {one} is not {other}"


def flat(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [] if x is None else [y for part in x for y in flat(part)]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or one.layout is not torch.strided:
        return one.layout is not torch.strided or torch.equal(one, other)
    error = 2e-2 if one.dtype == torch.bfloat16 else 2e-3
    return torch.allclose(one.double(), other.double(), rtol=error, atol=error, equal_nan=True)
