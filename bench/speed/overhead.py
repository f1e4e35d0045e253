"""What the engine itself costs per layer and decode step, beside what it computes.

A cache of one slot leaves next to nothing to attend to: what remains is Python, dispatch and the
cache's bookkeeping, from the keys that a layer hands over to the attention output that it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from kvpress.bench.common.candidates import candidate
from kvpress.bench.common.timing import Samples, interleave

from kvpress.hf.attention import attention


def measure(model: Any, policies: Sequence[str], rounds: int, warmup: int) -> dict[str, Samples]:
    """Seconds per layer and decode step of every policy; a round is one step of all layers."""
    with torch.inference_mode():
        calls = {policy: _step(model, policy, warmup + rounds) for policy in policies}
        samples = interleave(calls, rounds, warmup)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return {
        name: Samples([seconds / layers for seconds in taken.seconds])
        for name, taken in samples.items()
    }


def _step(model: Any, policy: str, steps: int) -> Callable[[int], None]:
    """A decode step, its token made beforehand, of a cache whose first token is there."""
    config = model.config.get_text_config(decoder=True)
    engine = candidate(model, policy, new_tokens=steps)
    layers = [layer.self_attn for layer in engine.model.base_model.layers]
    cache = engine.new_cache()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scaling = width**-0.5
    query, key = (
        torch.randn(1, heads, 1, width, dtype=model.dtype, device=model.device)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )

    def step(_: int) -> None:
        for index, layer in enumerate(layers):
            keys, values = cache.update(key, key, index)
            attention(layer, query, keys, values, None, scaling)

    step(0)
    return step
