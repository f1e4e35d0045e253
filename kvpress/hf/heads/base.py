"""What retrieval heads have in common: what they are given, and what they are told apart by."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.hf.support import fingerprint
from kvpress.policy.heads import NOTHING, RetrievalHead


def with_context(id_BT: Tensor, reach: int) -> Tensor:
    """The ids of whole texts with `reach` empty columns before them, as `project` takes them."""
    return torch.nn.functional.pad(id_BT, (reach, 0), value=NOTHING)


def floats(hidden: int, head: RetrievalHead) -> int:
    """Numbers that a token takes while it is projected: of embeddings, queries and keys.

    An embedding is looked up, made fp32, squared and normed; what is projected of it is turned by
    halves, of which there are copies.
    """
    return 5 * hidden + 4 * head.heads * (head.group + 1) * head.width


def check_columns(id_BT: Tensor, position_BQ: Tensor, reach: int) -> None:
    """Raises PolicyError where ids and positions do not belong together."""
    wanted = (position_BQ.shape[0], position_BQ.shape[1] + reach)
    if tuple(id_BT.shape) != wanted:
        raise PolicyError(
            f"ids of shape {list(id_BT.shape)} were given with positions of shape"
            f" {list(position_BQ.shape)}; a head that reaches {reach} ids back takes ids of shape"
            f" {list(wanted)}."
        )


def digest(words: str, tensors: dict[str, Tensor]) -> str:
    """A digest of words and of every byte of some tensors."""
    made = xxhash.xxh3_128(words.encode())
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        made.update(plain.numpy().data)
    return made.hexdigest()


def shape_of(model: Any) -> tuple[int, int, int]:
    """KV heads, query heads and channels of a hidden state of a target.

    Raises PolicyError where the layers that keep everything differ in heads.
    """
    kinds = [kind for kind in fingerprint(model.config).kinds if kind.window is None]
    heads = sorted({(kind.heads, kind.queries) for kind in kinds})
    if len(heads) != 1:
        raise PolicyError(
            f"The layers of {type(model).__name__} that keep all tokens have (KV heads, query"
            f" heads) {heads}: one selection for all layers needs layers that are alike."
        )
    return *heads[0], model.config.get_text_config(decoder=True).hidden_size
