"""The token ids that a cache has seen: what tells whether a text goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

UNKNOWN = -1  # a token that was given as an embedding
PADDING = -2  # a column that holds no token of its sequence
_PARTS = 256  # tensors held side by side before they become one


class SeenIds:
    """Ids `[B, T]` by columns, int32, where the model is; nothing here waits for a device."""

    def __init__(self, parts: Sequence[Tensor] = (), ended: bool = False) -> None:
        self._parts = list(parts)
        self.columns = sum(part.shape[1] for part in self._parts)  # seen, padding included
        self.ended = ended  # whether sequences that met their end early were fed padding

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.untyped_storage().nbytes() for part in self._parts)

    def note(self, columns_seen: int, given: Mapping[str, Any]) -> None:
        """Keeps the ids of a forward pass that is done, by its arguments, once.

        columns_seen: after it. The model inside another knows them first, where it is called.
        """
        if self.columns == columns_seen:
            return
        new_BQ = ids_of(given)
        if new_BQ is not None:
            self.append(new_BQ)

    def append(self, new_BQ: Tensor) -> None:
        """Adds the columns of a forward pass; see `columns_of`."""
        self._parts.append(new_BQ)
        self.columns += new_BQ.shape[1]
        if len(self._parts) > _PARTS:
            self.all()

    def all(self) -> Tensor:
        """All ids, int32 `[B, T]`; UNKNOWN and PADDING among them.."""
        if not self._parts:
            return torch.zeros(0, 0, dtype=torch.int32, device="cpu")
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, dim=1)]
        return self._parts[0]

    def real(self) -> Tensor:
        """True for columns that hold a token of their sequence: bool `[B, T]`."""
        return self.all() != PADDING

    def differs(self, ids: Tensor) -> tuple[int, int] | None:
        """The first (sequence, column) at which other ids `[B, T+]` were seen; None: nowhere.

        Padding and tokens that are not known differ from nothing. Waits for the device.
        """
        seen = self.all()
        given = ids[:, : seen.shape[1]].to(seen.device, torch.int32)
        other = (given != seen) & (seen >= 0)
        if not bool(other.any()):
            return None
        sequence, column = other.nonzero()[0].tolist()
        return sequence, column

    def select(self, index: Sequence[int]) -> None:
        """Sequence i becomes what sequence `index[i]` was."""
        if self._parts:
            self._parts = [self.all()[list(index)]]

    def crop(self, columns: int) -> None:
        """Forgets the last columns."""
        if columns and self._parts:
            seen = self.all()
            self._parts = [seen[:, : seen.shape[1] - columns].clone()]
            self.columns -= columns

    def copy(self) -> SeenIds:
        """The same for another cache; no tensor is ever written to once it stands here."""
        return SeenIds(self._parts, self.ended)

    def clear(self) -> None:
        """Forgets everything."""
        self._parts, self.columns, self.ended = [], 0, False


def text_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward pass that say its tokens, and no cache among them."""
    return {name: given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")}


def said_by(outer: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any]:
    """Which arguments say the tokens of a pass: those of the model around it, if no ids came in."""
    return given if outer is None or given.get("input_ids") is not None else outer


def ids_of(given: Mapping[str, Any]) -> Tensor | None:
    """The new columns of a forward pass, by its arguments; None where it has no tokens."""
    tokens, mask = given.get("input_ids"), given.get("attention_mask")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    plain = isinstance(mask, Tensor) and mask.dim() == 2
    return None if tokens is None else columns_of(tokens, mask if plain else None)


def columns_of(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """New columns of a forward pass: int32 `[B, Q]`, UNKNOWN and PADDING among them.

    tokens: ids `[B, Q]`, or embeddings `[B, Q, E]`, whose ids are not known. mask: `[B, T]`, 0 for
    padding, of which the last Q columns count; None: all tokens are real.
    """
    batch, new = tokens.shape[:2]
    if tokens.dim() == 2:
        part = tokens.to(torch.int32, copy=True)
    else:
        part = torch.full((batch, new), UNKNOWN, dtype=torch.int32, device=tokens.device)
    if mask is not None:
        part = part.masked_fill_(~mask[:, -new:].to(part.device, torch.bool), PADDING)
    return part
