"""Tiny random models and small tools that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers

VOCAB = 97

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

# name -> (config class, model class, fields)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 11}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2-mixed": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 16, "sliding_window": 9}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def tiny(family: str = "llama", query_heads: int = 6, kv_heads: int = 2, **fields: Any) -> Any:
    """A random model of a family, in eval mode; the same weights for the same arguments."""
    config_class, model_class, own = FAMILIES[family]
    heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
    width = {"hidden_size": 16 * query_heads}
    config = getattr(transformers, config_class)(**(_COMMON | heads | width | own | fields))
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval()


def prompt(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, tokens), generator=generator)


def padded(lengths: list[int], side: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids of these lengths in one batch, padded on a side, with their mask."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where] = prompt(1, length, seed + row)[0]
        mask[row, where] = 1
    return ids, mask


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int, cache: Any) -> torch.Tensor:
    """Greedy decoding by hand, right with padding on either side: the new tokens, `[B, new]`."""
    position = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(
        ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
    ).logits
    column = torch.arange(ids.shape[1])
    last = torch.where(mask.bool(), column, -1).max(1).values
    token = logits[torch.arange(len(ids)), last].argmax(-1, keepdim=True)
    seen, tokens = mask.sum(1, keepdim=True), [token]
    for _ in range(new - 1):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        out = model(
            token, attention_mask=mask, position_ids=seen, past_key_values=cache, use_cache=True
        )
        seen = seen + 1
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def positions(cache: Any, sequence: int = 0) -> list[list[list[int]]]:
    """The kept positions of one sequence: [layer][head]."""
    return [
        [cache.kept_positions(layer, sequence, head) for head in range(state.kind.heads)]
        for layer, state in enumerate(cache.states)
    ]


def live_storages(root: Any) -> int:
    """Bytes of every tensor storage that can be reached from an object: an independent ledger."""
    storages: dict[int, int] = {}
    for tensor in _tensors(root, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(node: Any, visited: set[int]) -> Iterator[torch.Tensor]:
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value, visited)
    elif isinstance(node, list | tuple | set):
        for value in node:
            yield from _tensors(value, visited)
    elif hasattr(node, "__dict__") and type(node).__module__.startswith("kvpress"):
        yield from _tensors(vars(node), visited)
