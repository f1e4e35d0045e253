"""PyTorch reference of `decode_steps`: one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from kvpress.csrc.decode_step import Operands as DecodeStep
from kvpress.csrc.decode_step.reference import check, decode_step
from kvpress.csrc.decode_steps import WRITES, Operands
from torch import Tensor

from kvpress.ops import shapes
from kvpress.ops.operands import Bounds, Columns, Noise, Pages, Token, named


def decode_steps(operands: Operands) -> Tensor:
    """Outputs `[T, N, 1, E]`; changes the pools and counts in place.

    Raises OperatorError, before anything is written, for lists of different lengths, for caches
    that differ in shape or dtype or share memory, and for what `decode_step` refuses.
    """
    steps = list(steps_of(operands))
    for step in steps:
        check(step)
    _check_alike(steps)
    _check_apart(operands)
    return torch.cat([decode_step(step) for step in steps])


def steps_of(operands: Operands) -> list[DecodeStep]:
    """The operands of every step. Raises OperatorError for lists of different lengths."""
    tokens, pools, (positions, masses), stays, evict, noises, logits = operands
    seen, quotas, recents, sinks, rank = stays
    number = len(tokens.queries)
    if not number:
        shapes.refuse("decode_steps", "queries is empty")
    for name, entries in _lists(operands).items():
        if len(entries) != number and not (name == "masses" and not entries):
            shapes.refuse(
                "decode_steps", f"{name} has {len(entries)} entries, queries has {number}"
            )
    return [
        DecodeStep(
            Token(*(x[t] for x in tokens)),
            Pages(*(x[t] for x in pools)),
            Columns(positions[t], masses[t] if masses else None),
            Bounds(seen[t], quotas[t], recents[t], sinks[t], rank),
            bool(evict[t]),
            Noise(noises.noise, noises.tau[t], noises.seed[t], noises.layer, noises.first),
            logits,
        )
        for t in range(number)
    ]


def _lists(operands: Operands) -> dict[str, Sequence[Any]]:
    """The lists by name."""
    return {name: x for name, x in named(operands).items() if isinstance(x, (list, tuple))}


def _check_alike(steps: list[DecodeStep]) -> None:
    """Raises OperatorError unless all are of one sequence, with outputs of one shape and dtype."""
    first = steps[0].token
    for number, (query_BN1D, _, value_BH1E) in enumerate(step.token for step in steps):
        if len(query_BN1D) != 1:
            shapes.refuse("decode_steps", f"cache {number} has {len(query_BN1D)} sequences, not 1")
        same = query_BN1D.shape[1] == first.query_BN1D.shape[1]
        same &= value_BH1E.shape[3] == first.value_BH1E.shape[3]
        if not same or query_BN1D.dtype != first.query_BN1D.dtype:
            shapes.refuse("decode_steps", f"cache {number} has other heads, widths or dtypes")


def _check_apart(operands: Operands) -> None:
    """Raises OperatorError where what one cache writes is another's."""
    tensors = {
        f"{name} {number}": x
        for name, entries in _lists(operands).items()
        for number, x in enumerate(entries)
        if isinstance(x, Tensor)
    }
    written = [name for name in tensors if name.split()[0] in WRITES]
    shapes.apart("decode_steps", tensors, written)
