"""What a retrieval head says of the tokens seen, before the first layer of a decode step.

Its keys follow from ids alone. So what is kept here can be made again at any time, and is: after a
cache was loaded, or a pass failed. It is no part of a saved cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.formulas.head_scores import scores
from kvpress.pipe.state.ids import PADDING, UNKNOWN, SeenIds
from kvpress.policy.heads import NOTHING, RetrievalHead
from kvpress.store.chosen import Memo

_GROWTH = 16  # room for a sixteenth more tokens, and as many at least


def room(tokens: int) -> int:
    """Tokens whose keys have a place once there must be one for so many."""
    return tokens + tokens // _GROWTH + _GROWTH


class Outlook:
    """The keys of a head for all tokens of one cache, by position, and what it looks at now.

    share_BHS: of a head's attention at each token of its sequence, by position, before a decode
    step: fp32, of every row 1 together; None before other passes. memo: what all layers choose by
    it, of the whole batch.
    """

    def __init__(self, head: RetrievalHead) -> None:
        self._head = head
        self._key_BHXD: Tensor | None = None  # with room for more tokens
        self._known: list[int] = []  # tokens of each sequence whose keys are there
        self.share_BHS: Tensor | None = None
        self.memo: Memo = {}

    def __deepcopy__(self, memo: object) -> Outlook:
        return self.copy()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self._key_BHXD, self.share_BHS)
        return sum(x.untyped_storage().nbytes() for x in held if x is not None)

    def look(self, seen: SeenIds, new_BQ: Tensor, columns_seen: int) -> None:
        """Takes in the tokens of a pass that is about to begin, and looks at all of them.

        seen: the ids before it, of so many columns. new_BQ: those of the pass, with PADDING and
        UNKNOWN. Raises CacheError where the ids of some tokens are not known.
        """
        self.share_BHS, self.memo = None, {}
        id_BT = torch.cat([seen.all().to(new_BQ.device), new_BQ], 1) if seen.columns else new_BQ
        if seen.columns != columns_seen or bool((id_BT == UNKNOWN).any()):
            raise CacheError(
                "A retrieval head reads the ids of all tokens, but some came as embeddings. Pass"
                " input_ids, or use a policy that chooses by the queries of each layer."
            )
        real_BT = id_BT != PADDING
        before = real_BT[:, : seen.columns].sum(1).tolist()
        both = zip(self._known or [0] * len(before), before, strict=True)
        known = [min(pair) for pair in both]  # a pass may have failed, or tokens were taken back
        length = real_BT.sum(1).tolist()
        id_BS = _by_position(id_BT.long(), real_BT, max(length))
        query_BND = self._project(id_BS, known, length)
        self._known = length
        if new_BQ.shape[1] == 1 and seen.columns:
            self.share_BHS = self._share(query_BND, length)

    def _project(self, id_BS: Tensor, known: Sequence[int], length: Sequence[int]) -> Tensor:
        """Makes the keys of new tokens. Returns the queries of the last ones: `[B, N, D]`."""
        new = max(1, *(end - begin for begin, end in zip(known, length, strict=True)))
        # The last `new` tokens of every sequence, and what the head reads before them.
        place_Q = torch.arange(-new - self._head.reach, 0, device=id_BS.device)
        place_BQ = place_Q + host.tensor(length).to(id_BS.device)[:, None]
        held_BQ = id_BS.gather(1, place_BQ.clamp_min(0)).where(place_BQ >= 0, NOTHING)
        position_BQ = place_BQ[:, self._head.reach :]
        query_BNQD, key_BHQD = self._head.project(held_BQ, position_BQ.clamp_min(0))
        self._make_room(key_BHQD, max(length))
        assert self._key_BHXD is not None, "there is room now"
        for b, (begin, end) in enumerate(zip(known, length, strict=True)):
            self._key_BHXD[b, :, begin:end] = key_BHQD[b, :, new - (end - begin) :]
        return query_BNQD[:, :, -1]

    def _make_room(self, key_BHQD: Tensor, tokens: int) -> None:
        old = self._key_BHXD
        if old is not None and old.shape[2] >= tokens:
            return
        batch, heads, _, width = key_BHQD.shape
        self._key_BHXD = key_BHQD.new_zeros(batch, heads, room(tokens), width)
        if old is not None:
            self._key_BHXD[:, :, : old.shape[2]] = old

    def _share(self, query_BND: Tensor, length: Sequence[int]) -> Tensor:
        assert self._key_BHXD is not None, "tokens are there"
        most, valid_B1S = max(length), None
        if min(length) < most:
            place_S = torch.arange(most, device=query_BND.device)
            valid_B1S = (place_S < host.tensor(length).to(place_S.device)[:, None])[:, None]
        key_BHSD = self._key_BHXD[:, :, :most]
        score_BHS = scores(query_BND, key_BHSD, self._head.group, valid_B1S)
        return score_BHS / score_BHS.sum(-1, keepdim=True)

    def select(self, index: Sequence[int]) -> None:
        """Sequence i becomes what sequence `index[i]` was."""
        self.share_BHS, self.memo = None, {}
        if self._key_BHXD is not None and self._known:
            self._key_BHXD = self._key_BHXD[list(index)]
            self._known = [self._known[i] for i in index]

    def copy(self) -> Outlook:
        """The same for another cache."""
        other = Outlook(self._head)
        other._known = list(self._known)
        other._key_BHXD = None if self._key_BHXD is None else self._key_BHXD.clone()
        return other

    def clear(self) -> None:
        """Forgets every token."""
        self._key_BHXD, self._known, self.share_BHS, self.memo = None, [], None, {}


def _by_position(id_BT: Tensor, real_BT: Tensor, most: int) -> Tensor:
    """Ids without padding, `[B, most]`: by position, NOTHING behind the last token."""
    if bool(real_BT.all()):
        return id_BT
    order_BT = (~real_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return id_BT.masked_fill(~real_BT, NOTHING).gather(1, order_BT)
