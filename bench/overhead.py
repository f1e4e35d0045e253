"""What the engine itself costs per layer and decode step, beside what it computes.

A cache of one slot leaves next to nothing to attend to: what remains is Python, dispatch and the
cache's bookkeeping, from the keys that a layer hands over to the attention output that it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from kvpress.bench.candidates import candidate
from kvpress.bench.timing import Samples, interleave

from kvpress.attachment import attention


def measure(
    model: Any, policies: Sequence[str], rounds: int, warmup: int, steps: int = 200
) -> dict[str, Samples]:
    """Seconds per layer and decode step of every policy; a round is `steps` steps of all layers."""
    with torch.inference_mode():
        calls = {policy: _steps(model, policy, steps) for policy in policies}
        samples = interleave(calls, rounds, warmup)
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return {
        name: Samples([seconds / steps / layers for seconds in taken.seconds])
        for name, taken in samples.items()
    }


def _steps(model: Any, policy: str, steps: int) -> Callable[[int], None]:
    """Decode steps, their tokens made beforehand, of a cache whose first token is there."""
    config = model.config.get_text_config(decoder=True)
    rival = candidate(model, policy, new_tokens=steps)
    layers, cache = rival.model.base_model.layers, rival.new_cache()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key = (
        torch.randn(1, heads, 1, width, dtype=model.dtype, device=model.device)
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )

    def step() -> None:
        for index, layer in enumerate(layers):
            keys, values = cache.update(key, key, index)
            attention(layer.self_attn, query, keys, values, None)

    def run(_: int) -> None:
        for _ in range(steps):
            step()

    step()
    return run
