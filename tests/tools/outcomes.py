"""What comes of a call of an operator: results and operands, or a refusal; how two compare."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import calls
import torch
from kvpress.csrc.decode_rows.reference import check_parts
from kvpress.csrc.decode_step import WRITES
from kvpress.csrc.decode_step import Operands as DecodeStep
from kvpress.csrc.decode_step import reference as step_reference

from kvpress.errors import OperatorError
from kvpress.ops import Old, shapes
from kvpress.ops.registry import implementation


def reference(name: str) -> Any:
    return step_over_old if name == "decode_step" else implementation(name, "reference")


def outcome(name: str, run: Any, call: calls.Call) -> Any:
    """The results and the operands after a call, or its refusal."""
    call = copy.deepcopy({name: detached(value) for name, value in call.items()})
    try:
        results = run(*calls.operands(name, call))
    except OperatorError as error:
        return error
    if isinstance(results, Attended):
        return results
    every = [x for value in call.values() for x in (value if is_list(value) else [value])]
    return results, [x for x in every if isinstance(x, torch.Tensor)]


def is_list(x: Any) -> bool:
    return isinstance(x, (list, tuple))


def detached(x: Any) -> Any:
    """The same without gradients, which operators that write refuse to have."""
    if isinstance(x, list):
        return [detached(entry) for entry in x]
    return x.detach() if isinstance(x, torch.Tensor) and x.requires_grad else x


def step_over_old(*given: Any) -> Any:
    """The reference of `decode_step`, which takes no old slots; their attention is added here."""
    operands = DecodeStep(*given)
    step, old = implementation("decode_step", "reference"), operands.old
    if not old.tensors and not old.layouts:
        return step(*operands)
    step_reference.check(operands)
    token, pages, columns, bounds, evict, *_ = operands
    parts = check_parts("decode_step", old, token.query_BN1D, pages)
    for _, (own, *_, position, mass, dropped) in parts:
        needed = [position, mass] if columns.mass_PS is not None else []
        needed += [position, dropped] if evict else []
        if len(own) and not all(x.numel() for x in needed):
            shapes.refuse("decode_step", "old slots lack what eviction needs")
    written = {f"{i}": x for i, x in enumerate(old.tensors) if i % 8 > 4}
    named = {f"old {i}": x for i, x in enumerate(old.tensors) if i % 8 <= 4} | written
    named |= token._asdict() | step_reference.of_layer(pages, columns, bounds)
    shapes.apart("decode_step", named, {*written, *WRITES})
    bare = operands._replace(columns=columns._replace(mass_PS=None), evict=False, old=Old())
    step(*bare._replace(bounds=bounds._replace(rank="position")))
    rows = (token.query_BN1D, pages, operands.logits, False, old)
    return Attended(implementation("decode_rows", "reference")(*rows)[0])


class Attended(NamedTuple):
    """An output alone: what became of the slots is not known."""

    out: torch.Tensor


def rounding(name: str, call: calls.Call) -> float:
    """By how much results on the CPU may differ because factors were rounded to bytes.

    call: one that was accepted.
    """
    if name != "score_cells" or not all(call[x].numel() for x in ("query_BND", "box_P2D")):
        return 0.0
    query, box = (call[x].detach().float().nan_to_num() for x in ("query_BND", "box_P2D"))
    return 2 * float(query.abs().amax() * box.abs().amax()) * query.shape[-1] / 127


def compare(given: Any, wanted: Any, what: str, rounded: float = 0.0) -> None:
    """Asserts that they are the same, up to what rounding may change."""
    if isinstance(given, OperatorError) or isinstance(wanted, OperatorError):
        assert isinstance(given, OperatorError), f"{what}: accepted, but {wanted}"
        assert isinstance(wanted, OperatorError), f"{what}: {given}, but the reference accepts it"
        return
    if isinstance(wanted, Attended):
        given, wanted = given[0], wanted.out
    pairs = list(zip(flat(given), flat(wanted), strict=True))
    for one, other in pairs:
        assert close(one, other, rounded), f"{what}: {one} is not {other}"


def flat(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    return [] if x is None else [y for part in x for y in flat(part)]


def close(one: torch.Tensor, other: torch.Tensor, rounded: float = 0.0) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or one.layout is not torch.strided:
        return one.layout is not torch.strided or torch.equal(one, other)
    error = 2e-2 if one.dtype == torch.bfloat16 else 2e-3
    both = (one.double(), other.double())
    return torch.allclose(*both, rtol=error, atol=error + rounded, equal_nan=True)
