"""How much attention a ranking of pages finds, and what the certificate says of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from kvpress.bench.calibrate.watch import Given
from kvpress.bench.retrieval.pages import OURS, RANKINGS, Seen, by_cells, seen_of
from torch import Tensor

from kvpress import ops
from kvpress.ops import Always, Logits, Places


@dataclass(frozen=True, kw_only=True)
class How:
    """What is read: tokens of a row at the most, one after the other; and from which pages.

    queries: of a prompt's second half. sink, recent: first and last tokens that are always read.
    """

    reads: Sequence[int] = (256, 512, 1024)
    queries: int = 64
    page: int = 32
    sink: int = 4
    recent: int = 64


class Row(NamedTuple):
    """One layer with one ranking: means over queries and query heads.

    read: tokens that were allowed; tokens_read: that a row read. recalled: share of attention on
    them. error: Σ|o − o'| / Σ|o|. omitted: the share of attention on what was not read, on average
    and at most; missed: what the certificate says that it is at the most. exceeded: how often it
    was more; compared: of so many.
    """

    layer: int
    tokens: int
    ranking: str
    read: int
    tokens_read: float
    recalled: float
    error: float
    omitted: float
    omitted_max: float
    missed: float
    missed_max: float
    exceeded: int
    compared: int


def measure(layer: int, given: Given, how: How) -> Iterator[Row]:
    """A row for every ranking and number of tokens."""
    seen = seen_of(given, how.queries, how.page)
    ours_ANW, bound_ANW = by_cells(seen)
    whole = _Whole(seen, seen.logits(), bound_ANW, seen.beside()[1])
    for name, rank in RANKINGS.items():
        score_ANW = ours_ANW if name == OURS else rank(seen)
        for read in how.reads:
            place_RW, chosen_R = choose(seen, score_ANW, read, how)
            read_AHT = tokens_read(seen, place_RW, chosen_R)
            yield Row(
                layer,
                read_AHT.shape[2],
                name,
                read,
                float(read_AHT.sum(-1).double().mean()),
                *whole.compare(read_AHT, place_RW, chosen_R),
            )


class _Whole(NamedTuple):
    """All attention of some queries, and what bounds it."""

    seen: Seen
    logit_ANT: Tensor
    bound_ANW: Tensor
    length_P2: Tensor

    def compare(self, read_AHT: Tensor, place_RW: Tensor, chosen_R: Tensor) -> tuple[Any, ...]:
        """What `Row` says from `recalled` on."""
        group = self.logit_ANT.shape[1] // self.seen.heads
        read_ANT = read_AHT.repeat_interleave(group, 1)
        kept_ANT = self.logit_ANT.masked_fill(~read_ANT, -torch.inf)
        omitted_AN = (self.logit_ANT.softmax(-1) * ~read_ANT).sum(-1)
        mass_AN = self._missed(place_RW, chosen_R)
        missed_AN = torch.sigmoid(mass_AN - kept_ANT.logsumexp(-1))
        value_NTE = self.seen.value_HTE.repeat_interleave(group, 0)
        exact_ANE, out_ANE = (_attend(x, value_NTE) for x in (self.logit_ANT, kept_ANT))
        # Both sides are sums in fp32.
        exceeded = int((omitted_AN > missed_AN * (1 + 1e-5) + 1e-6).sum())
        mean = float(omitted_AN.double().mean())
        return (
            1 - mean,
            float((exact_ANE - out_ANE).abs().sum() / exact_ANE.abs().sum()),
            mean,
            float(omitted_AN.max()),
            float(missed_AN.double().mean()),
            float(missed_AN.max()),
            exceeded,
            omitted_AN.numel(),
        )

    def _missed(self, place_RW: Tensor, chosen_R: Tensor) -> Tensor:
        """The certificate: ln Σ exp of the logits of pages that are not read, at the most."""
        seen, places = self.seen, Places(place_RW, chosen_R)
        given = (seen.query_AND, self.bound_ANW, seen.rows, places, self.length_P2)
        mass_AN: Tensor = ops.missed_mass(*given, Logits(seen.scaling), seen.page)[0]
        return mass_AN


def _attend(logit_ANT: Tensor, value_NTE: Tensor) -> Tensor:
    """The output `[A, N, E]`."""
    return torch.einsum("ant,nte->ane", logit_ANT.softmax(-1), value_NTE)


def choose(seen: Seen, score_ANW: Tensor, read: int, how: How) -> tuple[Tensor, Tensor]:
    """The pages that the engine would read with these scores: see `ops.choose_pages`."""
    first_W = torch.arange(seen.width, device=seen.at_A.device) * how.page
    span_W2 = torch.stack([first_W, first_W + how.page - 1], dim=1).int()
    open_A = seen.at_A + 1 - seen.pages_A * how.page
    keep_A = (read - open_A).clamp_min(0) // how.page
    keep_R, from_R = (x.repeat_interleave(seen.heads) for x in (keep_A, seen.at_A + 1 - how.recent))
    sink_R = torch.full_like(from_R, how.sink)
    span_P2 = span_W2.repeat(seen.heads, 1)
    return ops.choose_pages(score_ANW, seen.rows, Always(span_P2, sink_R, from_R), keep_R)


def tokens_read(seen: Seen, place_RW: Tensor, chosen_R: Tensor) -> Tensor:
    """Which tokens rows read: bool `[A, H, T]`. The slots of an open page are always read."""
    token_T = torch.arange(seen.key_HTD.shape[1], device=seen.at_A.device)
    page_RW = torch.zeros(len(chosen_R), seen.width + 1, dtype=torch.bool, device=token_T.device)
    page_RW.scatter_(1, place_RW.long().where(place_RW >= 0, seen.width), True)
    paged_RT = page_RW[:, (token_T // seen.page).clamp_max(seen.width)]
    read_AHT = paged_RT.view(len(seen.at_A), seen.heads, -1)
    whole_A11 = (seen.pages_A * seen.page)[:, None, None]
    return read_AHT.where(token_T < whole_A11, token_T <= seen.at_A[:, None, None])


def total(rows: Sequence[Row]) -> Row:
    """Layers with the same ranking and as many tokens, as one: means, and the least or largest."""
    names = ("tokens_read", "recalled", "error", "omitted", "missed")
    means: dict[str, Any] = {
        name: float(sum(getattr(row, name) for row in rows) / len(rows)) for name in names
    }
    return rows[0]._replace(
        omitted_max=max(row.omitted_max for row in rows),
        missed_max=max(row.missed_max for row in rows),
        exceeded=sum(row.exceeded for row in rows),
        compared=sum(row.compared for row in rows),
        **means,
    )
