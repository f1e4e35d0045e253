"""What a retrieval head is, and what its queries and keys say of past tokens.

A light head looks before layer 0 of a decode step; the tokens that it finds are what all layers
read (SpeContext, arXiv 2512.00722, section 4: a one-layer draft model of which embedding, query and
key projection are left). A head is stateless: ids and positions in, queries and keys out. Who keeps
the keys of past tokens also drops, copies and saves them.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.hf.support import fingerprint

NOTHING = -1  # the id of a column that holds no token: padding, or before the first one


class RetrievalHead(Protocol):
    """A projection of tokens to queries and keys.

    heads: KV heads of the target, H: each gets a selection of its own. width: channels D of a key.
    group: query heads per KV head, so that N = H · group. reach: how many ids before a token its
    query and key depend on; 0: on its own alone. fingerprint: of its weights and of its target.
    """

    @property
    def heads(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def reach(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def project(self, id_BT: Tensor, position_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, N, Q, D]` and keys `[B, H, Q, D]` of the last Q tokens, in fp32.

        id_BT: int64, T = reach + Q: the first `reach` columns are only context; NOTHING where there
        is no token, whose own query and key are finite and mean nothing. position_BQ: of the last Q
        columns, among the real tokens of their sequence; keys are turned by it.
        """
        ...


def scores(
    query_BND: Tensor, key_BHSD: Tensor, group: int, valid_BXS: Tensor | None = None
) -> Tensor:
    """How much a head looks at each token: fp32 `[B, H, S]`, the largest over its query heads.

    The softmax of q·k / √D over the tokens that are valid, then the maximum over the query heads of
    a group (SpeContext, GQA). valid_BXS: bool, X = 1 or H; what is not valid scores 0, and so does
    everything where nothing is.
    """
    heads, width = key_BHSD.shape[1], key_BHSD.shape[3]
    query_BHGD = torch.unflatten(query_BND.float(), 1, (heads, group)) / math.sqrt(width)
    logit_BHGS = query_BHGD @ key_BHSD.float().transpose(-1, -2)
    if valid_BXS is not None:
        logit_BHGS = logit_BHGS.masked_fill(~valid_BXS[:, :, None], -torch.inf)
    weight_BHGS: Tensor = logit_BHGS.softmax(-1)
    if valid_BXS is not None:  # a softmax over nothing is NaN
        weight_BHGS = weight_BHGS.masked_fill(~valid_BXS[:, :, None], 0.0)
    return weight_BHGS.amax(2)


def with_context(id_BT: Tensor, reach: int) -> Tensor:
    """The ids of whole texts with `reach` empty columns before them, as `project` takes them."""
    return torch.nn.functional.pad(id_BT, (reach, 0), value=NOTHING)


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
