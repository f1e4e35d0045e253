"""One decode step of the same layer of many caches: one operator call for all of them.

Between the texts there is nothing: each is counted, evicted from and observed by itself, and a text
that fails fails alone. One call saves what calls cost, and shares the texts among the threads.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.pipe.decode import Fused, begin_step, run_fused
from kvpress.pipe.forward import is_step, run_layer
from kvpress.pipe.stages.observe import recall
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.tokens import Tokens


class _Begun(NamedTuple):
    """A step of which the operator call is left to do. before: bytes that the layer held."""

    number: int
    layer: Layer
    fused: Fused
    before: int


def run_layers(layers: Sequence[Layer], tokens: Sequence[Tokens]) -> list[Tensor | Exception]:
    """What `run_layer` gives for one new token of the one sequence of each cache, or raises.

    layers: one of each cache, with the same place in the model.
    """
    found: dict[int, Tensor | Exception] = {}
    together: dict[Hashable, list[_Begun]] = {}
    joins = ops.backends()["cpu"] == "cpu" and not torch.is_grad_enabled()
    with ExitStack() as locks:
        for number, (layer, own) in enumerate(zip(layers, tokens, strict=True)):
            try:
                if not joins or not _joins(layer, own):
                    found[number] = run_layer(layer, own, None)
                    continue
                locks.enter_context(layer.rows.memory.lock)
                begun = _begin(number, layer, own)
                if isinstance(begun, _Begun):
                    together.setdefault(_alike(begun.fused), []).append(begun)
                else:
                    found[number] = begun
            except Exception as error:  # of this text alone: the others go on
                found[number] = error
        for steps in together.values():
            found |= _run(steps)
    return [found[number] for number in range(len(layers))]


def _joins(layer: Layer, tokens: Tokens) -> bool:
    """Whether a step is counted and run as `_begin` does it.

    Where forks grow one pool, it may be replaced by the next text before this one wrote to it.
    """
    if torch.is_inference_mode_enabled() or not is_step(layer, tokens, None):
        return False
    if layer.context.looks or layer.kind.readers or layer.stores.packs:
        return False
    return len(layer.sequences) == 1 and len(layer.rows.paging.pool.members) == 1


def _begin(number: int, layer: Layer, tokens: Tokens) -> _Begun | Tensor:
    """What comes before the operator call; or the output, where there is no such call."""
    before = 0 if layer.context.heap is None else layer.rows.memory.nbytes
    layer.seen = None
    layer.advance_one()
    if layer.recalled:
        recall(layer, [0], tokens.query_bNQD)
    begun = begin_step(layer, tokens)
    if isinstance(begun, Fused):
        return _Begun(number, layer, begun, before)
    _end(layer, before)
    return begun


def _end(layer: Layer, before: int) -> None:
    """What comes last in a pass."""
    heap = layer.context.heap
    if heap is not None and (after := layer.rows.memory.nbytes) > before:  # a pool grew
        heap.stored(after)
    layer.context.dirty = None


def _alike(fused: Fused) -> Hashable:
    """What steps of one call have in common."""
    _, _, columns, bounds, _, noise, logits, old = fused.operands
    kinds = bounds.rank, columns.mass_PS is None, noise.noise, noise.layer, noise.first
    return *kinds, logits, bool(old.tensors)


def _run(steps: list[_Begun]) -> dict[int, Tensor | Exception]:
    """The outputs of steps that are alike."""
    if len(steps) == 1 or steps[0].fused.operands[-1].tensors:
        return {step.number: _run_alone(step) for step in steps}
    begun = perf_counter()
    try:
        out_TN1E = ops.decode_together([step.fused.operands for step in steps])
    except OperatorError:  # before anything was written: one by one it shows whose fault it is
        return {step.number: _run_alone(step) for step in steps}
    except Exception as error:
        return {step.number: error for step in steps}
    seconds = (perf_counter() - begun) / len(steps)
    found: dict[int, Tensor | Exception] = {}
    for (number, layer, fused, before), out_1N1E in zip(
        steps, torch.split(out_TN1E, 1), strict=True
    ):
        layer.context.ledger.meter.add("decode attention", seconds)
        layer.count_step(fused.evicts)
        _end(layer, before)
        found[number] = out_1N1E
    return found


def _run_alone(step: _Begun) -> Tensor | Exception:
    try:
        out_1N1E = run_fused(step.layer, step.fused)
    except Exception as error:
        return error
    _end(step.layer, step.before)
    return out_1N1E
