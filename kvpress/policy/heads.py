"""What a retrieval head is: it looks before the first layer of a step, so that loading can begin.

A light head whose queries and keys follow from ids alone says which tokens all layers are to read
(arXiv 2512.00722, section 4: of a one-layer draft model the embedding, the query and
the key projection are left).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

NOTHING = -1  # the id of a column that holds no token: padding, or before the first one


class RetrievalHead(Protocol):
    """A projection of tokens to queries and keys. It keeps nothing: ids and positions in.

    heads: KV heads of the target, H: each gets a selection of its own. width: channels D of a key.
    group: query heads per KV head, so that N = H · group. reach: how many ids before a token its
    query and key depend on; 0: on its own alone. fingerprint: of its weights and of its target.
    nbytes: of its weights, those of the target left out. floats: numbers in fp32 that a token takes
    at the most while it is projected.
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
    @property
    def nbytes(self) -> int: ...
    @property
    def floats(self) -> int: ...

    def project(self, id_BT: Tensor, position_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[B, N, Q, D]` and keys `[B, H, Q, D]` of the last Q tokens, in fp32.

        id_BT: int64, T = reach + Q: the first `reach` columns are only context; NOTHING where there
        is no token, whose own query and key are finite and mean nothing. position_BQ: of the last Q
        columns, among the real tokens of their sequence; keys are turned by it.
        """
        ...
