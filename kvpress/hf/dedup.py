"""Equal prompts in one batch, as beam search and `num_return_sequences` make them, run once.

A forward pass over a prompt gets one sequence of each kind; its output and its cache are then
repeated. The repeated sequences share their pages: a beam costs no copy of the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvpress import host
from kvpress.hf.cache import EngineCache
from kvpress.pipe.state.layer import Layer

_PER_SEQUENCE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_HARMLESS = frozenset(
    {"use_cache", "logits_to_keep", "return_dict", "output_hidden_states", "cache_position"}
)


def merge(given: dict[str, Any], cache: EngineCache, cache_name: str, config: Any) -> Tensor | None:
    """Leaves one sequence of each kind in the arguments of a forward pass and in its cache.

    Returns which of them stands for each sequence: int64 `[B]`; None if no two are equal, or if
    something is asked for that could not be repeated afterwards.
    """
    others = given.keys() - {*_PER_SEQUENCE, *_HARMLESS, cache_name}
    structured = given.get("return_dict")
    if not (getattr(config, "return_dict", True) if structured is None else structured):
        return None
    if any(given[name] is not None for name in others):
        return None
    inputs = {n: given[n] for n in _PER_SEQUENCE if given.get(n) is not None}
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if torch.is_grad_enabled() or tokens is None or min(tokens.shape[:2]) < 2:
        return None
    batch = len(tokens)
    if cache.batch_size not in (-1, batch):
        return None  # refused by the layers
    if not all(isinstance(x, Tensor) and len(x) in (1, batch) for x in inputs.values()):
        return None
    seen, mask = cache.columns_seen, inputs.get("attention_mask")
    if mask is not None and mask.shape != (batch, seen + tokens.shape[1]):
        return None  # refused with the shapes of the caller
    if "position_ids" in inputs and inputs["position_ids"].dim() != 2:
        return None  # a plane for each axis, not a row for each sequence
    kinds = [x.reshape(batch, -1).double().cpu() for x in inputs.values() if len(x) == batch]
    kinds.append(_alike(cache, batch)[:, None].double())
    _, number_B = torch.unique(torch.cat(kinds, dim=1), dim=0, return_inverse=True)
    kept, kind_B = _in_order(number_B.tolist())
    if len(kept) == batch:
        return None
    for name, x in inputs.items():
        if len(x) == batch:
            given[name] = x[kept]
    cache.select(kept)
    return kind_B


def _alike(cache: EngineCache, batch: int) -> Tensor:
    """A number for each of `batch` sequences, the same for those that hold the same pages."""
    held = [_contents(state) for state in cache.states if state.store is not None]
    numbers: dict[Any, int] = {}
    keys = zip(*held, strict=True)
    alike = [numbers.setdefault(key, len(numbers)) for key in keys] if held else [0] * batch
    return host.tensor(alike)


def _contents(layer: Layer) -> list[tuple[int, ...]]:
    """For each sequence of a layer, what tells whether it holds the same as another one."""
    pages, seen_B = layer.rows.memory.pages_of_sequences(), layer.sequences.seen_B
    return [(seen, *held) for seen, held in zip(seen_B.tolist(), pages, strict=True)]


def _in_order(kinds: list[int]) -> tuple[list[int], Tensor]:
    """The first sequence of each kind, in the order of the batch, and their places for all."""
    kept = sorted({kind: b for b, kind in reversed(list(enumerate(kinds)))}.values())
    place = {kinds[b]: i for i, b in enumerate(kept)}
    return kept, host.tensor([place[kind] for kind in kinds])


def repeat_outputs(output: Any, cache: EngineCache, kind_B: Tensor) -> None:
    """Repeats the output of a forward pass and the sequences of its cache."""
    kept = int(kind_B.max()) + 1
    for name, value in output.items():
        if isinstance(value, Tensor):
            output[name] = _repeat(value, kind_B, kept)
        elif isinstance(value, tuple):
            output[name] = tuple(_repeat(x, kind_B, kept) for x in value)
    cache.select(kind_B.tolist())


def _repeat(value: Any, kind_B: Tensor, kept: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != kept:
        return value
    return value.index_select(0, kind_B.to(value.device))
