"""What belongs to each sequence of a layer, and follows it through beams, forks and files."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from kvpress import host
from kvpress.host import lasting
from kvpress.pipe.state.drafting import Drafts
from kvpress.pipe.state.spans import Ranges, Spans
from kvpress.policy.budget import UNLIMITED

_Q = TypeVar("_Q", bound="_Queries")


class Kept(Protocol):
    """A field of `Sequences` that is no tensor."""

    def select(self, index: Sequence[int]) -> Any:
        """Another one, whose sequence i is what sequence `index[i]` is."""

    def clone(self) -> Any:
        """Another one that goes on by itself."""

    def state(self) -> dict[str, Tensor]:
        """What a file must hold, by names that nothing else has; on the host."""


class Decoded:
    """How many tokens every sequence decoded since its last prompt.

    While all are in step that is a number: a decode step makes as few tensors as it can.
    """

    def __init__(self, tokens_B: Tensor | None = None) -> None:
        self._tokens_B = host.zeros(0) if tokens_B is None else tokens_B
        self._alike: int | None = None  # the same for every sequence, where it is

    @property
    @lasting
    def tokens_B(self) -> Tensor:
        """int64, on the host; to be written to as well."""
        if self._alike is not None:
            self._tokens_B, self._alike = host.full((len(self),), self._alike), None
        return self._tokens_B

    def of(self, sequence: int) -> int:
        """Those of one sequence."""
        return int(self._tokens_B[sequence]) if self._alike is None else self._alike

    def add_to_all(self, tokens: int) -> None:
        """Counts tokens of sequences that have all decoded as many so far."""
        self._alike = self.of(0) + tokens

    def take_back(self, tokens: int) -> None:
        """Counts tokens no more."""
        self._tokens_B = (self.tokens_B - tokens).clamp_min(0)

    def __len__(self) -> int:
        return len(self._tokens_B)

    def select(self, index: Sequence[int]) -> Decoded:
        """Sequence i becomes what sequence `index[i]` was."""
        return Decoded(self.tokens_B[list(index)])

    def clone(self) -> Decoded:
        """Another one that goes on by itself."""
        return Decoded(self.tokens_B.clone())

    def state(self) -> dict[str, Tensor]:
        """`decoded_B`."""
        return {"decoded_B": self.tokens_B.clone()}


class _Queries(dict[int, Tensor]):
    """Queries of some sequences, by their numbers: tensors are replaced, never written to."""

    PREFIX = ""  # before the number of a sequence, in files

    def select(self: _Q, index: Sequence[int]) -> _Q:
        """Sequence i becomes what sequence `index[i]` was."""
        return type(self)({i: self[b] for i, b in enumerate(index) if b in self})

    def clone(self: _Q) -> _Q:
        """Another one that goes on by itself."""
        return type(self)(self)

    def state(self) -> dict[str, Tensor]:
        """A tensor for each sequence."""
        return {f"{self.PREFIX}{b}": query.cpu().contiguous() for b, query in self.items()}


class Watched(_Queries):
    """The last queries `[N, Q, D]` of those sequences of which no slot is old yet."""

    PREFIX = "watched."

    def take_back(self, tokens: int) -> None:
        """Forgets the last queries of every sequence."""
        for b, query_NQD in self.items():
            self[b] = query_NQD[:, : max(0, query_NQD.shape[1] - tokens)]


class Recalled(_Queries):
    """The last queries `[N, Q, D]` of every sequence, where scores see them while decoding."""

    PREFIX = "recalled."

    def add(self, b: int, query_NQD: Tensor, most: int) -> None:
        """Keeps the last `most` of those that are there and new ones."""
        new_NQD, before_NQD = query_NQD.detach()[:, -most:], self.get(b)
        if before_NQD is not None and new_NQD.shape[1] < most:
            before_NQD = before_NQD[:, max(0, before_NQD.shape[1] + new_NQD.shape[1] - most) :]
            self[b] = torch.cat([before_NQD, new_NQD], dim=1)
        else:
            self[b] = new_NQD.clone()

    def last(self, group: Sequence[int], most: int) -> Tensor:
        """The last `most` of some sequences: `[b, N, most, D]`.

        The first one of a sequence that has fewer stands for those that are missing, so that what
        a sequence is given does not depend on those beside it.
        """
        made = []
        for query_NQD in (self[b] for b in group):
            missing = most - query_NQD.shape[1]
            made.append(torch.cat([query_NQD[:, :1].expand(-1, missing, -1), query_NQD], dim=1))
        return torch.stack(made)


class Earlier(_Queries):
    """The queries `[N, D]` of the last decode step of sequences, where pages are chosen by them."""

    PREFIX = "earlier."


class Counter(NamedTuple):
    """How a tensor of `Sequences` begins, and what files hold of it."""

    start: float
    dtype: torch.dtype
    on_host: bool


def counter(start: float = 0, dtype: torch.dtype = torch.int64, on_host: bool = True) -> Any:
    """A field with a number for each sequence, or row where its name ends with `_R`.

    on_host: otherwise it is on the device of the layer, for what only operators read.
    """
    return field(
        default_factory=lambda: host.zeros(0, dtype=dtype),
        metadata={"counter": Counter(start, dtype, on_host)},
    )


@dataclass
class Sequences:
    """A counter added here is begun, selected, cloned, saved and loaded with the others.

    A field that is no counter answers `Kept`, and snapshot.py says how it is read back.
    """

    heads: int  # KV heads, rows of a sequence
    seen_B: Tensor = counter()  # real tokens
    sink_B: Tensor = counter(on_host=False)  # protected first tokens
    guarded_B: Tensor = counter()  # protected tokens besides the last ones
    planned_B: Tensor = counter()  # tokens seen when rows last got budgets of their own
    looked_B: Tensor = counter()  # tokens that were scored, where steps of decoding score none
    demand_B: Tensor = counter(math.nan, torch.float64)  # of slots; NaN: not known yet
    threshold_B: Tensor = counter(math.nan, torch.float32, on_host=False)  # NaN: none evicted yet
    portion_R: Tensor = counter(1.0, torch.float64)  # of the budget, while decoding
    quota_R: Tensor = counter(UNLIMITED)  # slots that every row may keep
    recent_R: Tensor = counter()  # protected last tokens of it
    decoded: Decoded = field(default_factory=Decoded)
    watched: Watched = field(default_factory=Watched)
    recalled: Recalled = field(default_factory=Recalled)
    earlier: Earlier = field(default_factory=Earlier)
    drafts: Drafts = field(default_factory=Drafts)
    spans: Spans = field(default_factory=Spans)  # protected tokens behind the first ones

    @classmethod
    def counters(cls) -> dict[str, Counter]:
        """The counters by name."""
        found = {f.name: f.metadata.get("counter") for f in fields(cls)}
        return {name: counter for name, counter in found.items() if counter is not None}

    def begin(self, batch: int, starts: Mapping[str, float], device: torch.device) -> None:
        """Gives every counter its first value, for so many sequences.

        starts: of counters that begin otherwise than they say. device: of the layer.
        """
        for name, of in self.counters().items():
            length, start = batch * self.heads if name.endswith("_R") else batch, of.start
            setattr(self, name, host.full((length,), starts.get(name, start), dtype=of.dtype))
        self.decoded = Decoded(host.zeros(batch))
        self.move(device)

    def move(self, device: torch.device) -> None:
        """Brings counters to where they are needed, in a layer on this device."""
        for name, of in self.counters().items():
            if not of.on_host:
                setattr(self, name, getattr(self, name).to(device))

    def protect(self, ranges: Sequence[Ranges]) -> None:
        """Protects tokens of every sequence; those from the first one on are sinks."""
        rest, sinks = [], self.sink_B.tolist()
        for b, own in enumerate(ranges):
            if own and own[0][0] <= sinks[b]:
                sinks[b], own = max(sinks[b], own[0][1]), own[1:]
            rest.append(tuple((max(first, sinks[b]), last) for first, last in own))
        self.guarded_B, self.spans = host.tensor(sinks), Spans(rest)
        self.sink_B = self.guarded_B.to(self.sink_B.device)

    def guard(self, group: Sequence[int], seen_b: Tensor) -> None:
        """Counts the protected tokens of some sequences that have seen so many."""
        self.guarded_B = self.guarded_B.clone()  # growths tell by the tensor
        sinks = self.sink_B.tolist()
        for b, seen in zip(group, seen_b.tolist(), strict=True):
            self.guarded_B[b] = sinks[b] + self.spans.count(b, seen)

    def __len__(self) -> int:
        return len(self.seen_B)

    @property
    def nbytes(self) -> int:
        """Bytes of queries that are kept, and of what drafts attended to."""
        kept = (self.watched, self.recalled, self.earlier)
        queries = [query for of_all in kept for query in of_all.values()]
        return self.drafts.nbytes + sum(query.nbytes for query in queries)

    @property
    def quota_BH(self) -> Tensor:
        """Slots that every row may keep, a view to be written to as well."""
        return self.quota_R.view(-1, self.heads)

    @property
    def portion_BH(self) -> Tensor:
        """What every row gets of the budget while decoding, a view to be written to as well."""
        return self.portion_R.view(-1, self.heads)

    @property
    def recent_BH(self) -> Tensor:
        """Protected last tokens of every row, a view to be written to as well."""
        return self.recent_R.view(-1, self.heads)

    def select(self, index: Sequence[int]) -> Sequences:
        """Others, whose sequence i is what sequence `index[i]` is here."""
        chosen = list(index)
        rows = [b * self.heads + head for b in chosen for head in range(self.heads)]
        made = copy.copy(self)
        for name, value in self._fields():
            if isinstance(value, Tensor):
                new: Any = value[rows if name.endswith("_R") else chosen]
            else:
                new = value.select(chosen)
            setattr(made, name, new)
        return made

    def clone(self) -> Sequences:
        """Others that hold the same and go on by themselves."""
        made = copy.copy(self)
        for name, value in self._fields():
            setattr(made, name, value.clone())
        return made

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors on the host by name."""
        state: dict[str, Tensor] = {}
        for name, value in self._fields():
            own = {name: value.cpu().clone()} if isinstance(value, Tensor) else value.state()
            state.update(own)
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave of the counters and of decoded tokens."""
        for name in self.counters():
            setattr(self, name, state[name].clone())
        self.decoded = Decoded(state["decoded_B"].clone())

    def _fields(self) -> Iterator[tuple[str, Any]]:
        yield from ((f.name, getattr(self, f.name)) for f in fields(self)[1:])
