"""How much of a target's attention the tokens hold that a head would have all layers read.

What a step always reads is left out on both sides: recalled is the share of the attention to what
is chosen from. Of a query it is one number per layer, the sum over the KV heads that was found by
the sum that is there, so that a head which looks at nothing far back counts as little as it should.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from kvpress.bench.distill.contexts import Context, Maker, sampled
from kvpress.bench.distill.maps import Always, watch
from torch import Tensor

from kvpress.formulas.head_scores import scores
from kvpress.hf.heads.base import with_context
from kvpress.policy.heads import RetrievalHead

PROSE, ASKED = "text", "facts and repeats"
TOKENS, PAGES = "tokens", "pages"
RECENCY, RANDOM, SHARED, OWN = "recency", "random", "true mass, all layers", "true mass, each layer"
_RESAMPLES, _LEVEL, _DIGITS = 1000, 0.95, 4
_LEAST = 1e-6  # attention that a query must have there to be counted


class Row(NamedTuple):
    """A ranking of one kind of text: means, and their intervals over contexts and queries.

    read: tokens that were chosen, one by one or as whole pages (`unit`). recalled, low, high: of
    each layer, and at the end of all layers together.
    """

    kind: str
    ranking: str
    unit: str
    read: int
    recalled: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Found(NamedTuple):
    """What was measured.

    rows: of every kind of text, ranking, unit, and number of tokens. gains: by how much the first
    head found more than the ranking that a row names, query by query: intervals of differences of
    the same queries are narrower than those of either.
    """

    rows: list[Row]
    gains: list[Row]


class How(NamedTuple):
    """What is measured. contexts: of each kind. queries: of a context's second half."""

    tokens: int
    contexts: int
    queries: int
    reads: Sequence[int]
    page: int
    seed: int
    always: Always


Shares = dict[tuple[str, str, int], list[Tensor]]  # ranking, unit, read: `[L, A]` of each context


def measure(
    model: Any,
    maker: Maker,
    heads: Mapping[str, RetrievalHead],
    how: How,
    on_context: Callable[[], None] = lambda: None,
) -> Found:
    """How much every head and baseline finds, and how much more the first one does."""
    found, first = Found([], []), next(iter(heads))
    for kind in (PROSE, ASKED):
        shares: Shares = {}
        for number in range(how.contexts):
            context = _context(maker, kind, number, how)
            for place, share_LA in _measured(model, context, heads, how, number):
                shares.setdefault(place, []).append(share_LA)
            on_context()
        for (ranking, unit, read), some in shares.items():
            own, its = torch.stack(some), torch.stack(shares[first, unit, read])
            found.rows.append(Row(kind, ranking, unit, read, *intervals(own)))
            if ranking not in (first, SHARED, OWN):
                found.gains.append(Row(kind, ranking, unit, read, *intervals(its - own)))
    return found


def _context(maker: Maker, kind: str, number: int, how: How) -> Context:
    if kind == ASKED:
        return maker.make(f"recall-{how.seed}", number)
    return maker.plain(number * maker.room // max(1, how.contexts - 1))


def _measured(
    model: Any, context: Context, heads: Mapping[str, RetrievalHead], how: How, number: int
) -> list[tuple[tuple[str, str, int], Tensor]]:
    """The shares of every ranking in one context."""
    id_T = torch.tensor(context.ids, device=model.device)
    places = sampled(context, how.queries, len(id_T) // 2, f"{how.seed}-{number}")
    at_A = torch.tensor(places, device=model.device)
    layers: list[Tensor] = []
    watch(model, id_T, at_A, how.always, lambda _, mass_HAT: layers.append(mass_HAT))
    mass_LHAT = torch.stack(layers)
    rankings = {name: scored(head, id_T, at_A, how.always) for name, head in heads.items()}
    rankings |= _baselines(mass_LHAT, how, number)
    chosen_AT = how.always.chosen_from(at_A, len(id_T))
    found = []
    for name, score_XHAT in rankings.items():
        score_XHAT = score_XHAT.float().masked_fill(~chosen_AT, -1.0)
        for read in how.reads:
            for unit in (TOKENS, PAGES):
                share_LA = _share(mass_LHAT, score_XHAT, read, how.page if unit == PAGES else 1)
                found.append(((name, unit, read), share_LA))
    return found


@torch.no_grad()
def scored(head: RetrievalHead, id_T: Tensor, at_A: Tensor, always: Always) -> Tensor:
    """The scores of a head for some queries of a context: `[1, H, A, T]`."""
    position_1T = torch.arange(len(id_T), device=id_T.device)[None]
    query_1NTD, key_1HTD = head.project(with_context(id_T[None], head.reach), position_1T)
    chosen_AT = always.chosen_from(at_A, len(id_T))
    made = [
        scores(query_1NTD[:, :, at], key_1HTD, head.group, chosen_T[None, None])
        for at, chosen_T in zip(at_A.tolist(), chosen_AT, strict=True)
    ]
    return torch.stack(made, dim=2)


def _baselines(mass_LHAT: Tensor, how: How, number: int) -> dict[str, Tensor]:
    """What knows nothing, and what knows everything: for all layers together, and for each."""
    generator = torch.Generator().manual_seed(how.seed * 1009 + number)
    shape = (1, *mass_LHAT.shape[1:])
    place_T = torch.arange(shape[-1]).float() / shape[-1]
    drawn = torch.rand(shape, generator=generator)
    found = {
        RECENCY: place_T.expand(shape),
        RANDOM: drawn,
        SHARED: mass_LHAT.mean(0, keepdim=True),
        OWN: mass_LHAT,
    }
    return {name: score.to(mass_LHAT.device) for name, score in found.items()}


def _share(mass_LHAT: Tensor, score_XHAT: Tensor, read: int, page: int) -> Tensor:
    """What the best tokens or pages hold, of all that is there: `[L, A]`; NaN of nothing."""
    if page > 1:
        mass_LHAT, score_XHAT = _paged(mass_LHAT, page), _paged(score_XHAT.clamp_min(0), page)
    count = min(read // page, mass_LHAT.shape[-1])
    best_XHAK = score_XHAT.topk(count, dim=-1).indices
    best_LHAK = best_XHAK.expand(len(mass_LHAT), -1, -1, -1)
    held_LA = mass_LHAT.gather(-1, best_LHAK).sum((1, 3))
    there_LA = mass_LHAT.sum((1, 3))
    return (held_LA / there_LA).masked_fill(there_LA < _LEAST, torch.nan).cpu()


def _paged(x_XHAT: Tensor, page: int) -> Tensor:
    """Sums over whole pages, the last of which may be short."""
    padded = torch.nn.functional.pad(x_XHAT, (0, -x_XHAT.shape[-1] % page))
    paged: Tensor = torch.unflatten(padded, -1, (-1, page)).sum(-1)
    return paged


def intervals(share_XLA: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Means, lower and upper ends of each layer, and of all: share: of contexts, layers, queries.

    The bootstrap draws contexts, and in each of them queries (Efron 1979): the same for all rows.
    """
    share_XLA = torch.cat([share_XLA, share_XLA.nanmean(1, keepdim=True)], dim=1)
    contexts, layers, queries = share_XLA.shape
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(_RESAMPLES):
        some = torch.randint(contexts, (contexts,), generator=generator)
        own = torch.randint(queries, (contexts, 1, queries), generator=generator)
        means.append(share_XLA[some].gather(2, own.expand(-1, layers, -1)).nanmean((0, 2)))
    tail = (1 - _LEVEL) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.stack(means).double().quantile(ends, dim=0)
    mean, low, high = (
        [round(x, _DIGITS) for x in ends.tolist()]
        for ends in (share_XLA.nanmean((0, 2)), low, high)
    )
    return mean, low, high
