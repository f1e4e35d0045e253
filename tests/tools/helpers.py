"""Small tools that several test files share; `families` makes the tiny random models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from families import FAMILIES as FAMILIES  # what tests ask of this module
from families import VOCAB
from families import tiny as tiny
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import kvpress
from kvpress.policy import Slots
from kvpress.policy.loading import available


def sharp(family: str, **fields: Any) -> Any:
    """A random model whose next token depends on what it attends to."""
    # With tied embeddings gemma3 says its last token again, whatever it attends to.
    return tiny(family, initializer_range=0.3, tie_word_embeddings=False, **fields)


def characters() -> PreTrainedTokenizerFast:
    """One token for every printable character: as many as the tiny models know."""
    vocabulary = {"<pad>": 0, "<s>": 1} | {chr(code): code - 30 for code in range(32, 127)}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", padding_side="left"
    )


def recipes() -> dict[str, str]:
    """Every policy that any model can have, by name: with small options, and what it goes with.

    Those that must know something of the model beforehand have tests of their own.
    """
    small = {
        "adakv": "snapkv:window=8+adakv",
        "chunkkv": "snapkv:window=8+chunkkv",
        "compactor": "compactor:sink=2",
        "criticalkv": "snapkv:window=8+criticalkv",
        "d2o": "d2o:budget=0.4",
        "kvzip": "kvzip:instruction=,further=,chunk=40",
        "matching": "snapkv:window=8+matching",
        "r_kv": "r_kv:recent=4,interval=3",
        "snapkv": "snapkv:window=8",
    }
    own = [n for n, cls in available().items() if not must_know(cls()) and n != "sale"]
    return {name: small.get(name, name) for name in sorted(own)}


def must_know(policy: Any) -> bool:
    """Whether a policy must know a model beforehand, from a calibration or by a trained head."""
    rule = policy.retrieve(9)
    return policy.calibrated is not None or (rule is not None and rule.head is not None)


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
def decoded(
    model: Any, recipe: str, ids: torch.Tensor, new: int, mask: Any = None, **engine: Any
) -> tuple[torch.Tensor, Any]:
    """The new tokens of a model with a policy, and the cache that it leaves."""
    mask = torch.ones_like(ids) if mask is None else mask
    with kvpress.attach(model, recipe, **engine) as made:
        cache = made.new_cache(max_new_tokens=new)
        return greedy(model, ids, mask, new, cache), cache


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


def check_padded_rows(model: Any, recipe: str, lengths: list[int]) -> None:
    """That rows of a batch that is padded on the left say what they say alone."""
    ids, mask = padded(lengths, "left")
    with kvpress.attach(model, recipe) as engine:
        together = greedy(model, ids, mask, 8, engine.new_cache())
        for row, length in enumerate(lengths):
            alone, one = ids[row : row + 1, -length:], mask[row : row + 1, -length:]
            tokens = greedy(model, alone, one, 8, engine.new_cache())
            assert torch.equal(tokens[0], together[row])


def positions(cache: Any, sequence: int = 0) -> list[list[list[int]]]:
    """The kept positions of one sequence: [layer][head]."""
    return [
        [cache.kept_positions(state.kind.index, sequence, h) for h in range(state.kind.heads)]
        for state in cache.states
    ]


def kept_keys(cache: Any, sequence: int) -> torch.Tensor:
    """The keys that one sequence holds in the first layer, by position: `[H, S, D]`."""
    return cache.states[0].store.dense_by_position([sequence])["key"][0]


def live_storages(root: Any) -> int:
    """Bytes of every tensor storage that can be reached from an object: an independent ledger."""
    storages: dict[int, int] = {}
    for tensor in live_tensors(root):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def live_tensors(root: Any) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached from an object of the engine."""
    return _tensors(root, set())


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


def shown(key: Any, value: Any = None, positions: Any = None, **more: Any) -> Slots:
    """What a policy is shown of one row of slots, or of several of one layer."""
    key = torch.as_tensor(key, dtype=torch.float32)
    key = key if key.dim() == 4 else key[None, None]
    value = key if value is None else torch.as_tensor(value, dtype=torch.float32).view_as(key)
    place = torch.arange(key.shape[2]).expand(key.shape[:3])
    place = place if positions is None else torch.as_tensor(positions).view(key.shape[:3])
    return Slots(
        layer=0,
        position_BHS=place,
        seen_B=(place.flatten(1).max(1).values + 1),
        new_tokens=key.shape[2],
        fetch={"key": key, "value": value}.__getitem__,
        **more,
    )
