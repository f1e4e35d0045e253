"""Pages of a layer's keys as a decode step sees them, and the rankings that choose among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from kvpress.bench.calibrate.watch import Given
from torch import Tensor

from kvpress import ops
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import Places, RowPages

BITS = 2  # of cells


@dataclass(frozen=True)
class Seen:
    """Some queries of a prompt as decode steps, each over the keys up to its own.

    at_A: the positions of the queries. key_HTD, value_HTE: all keys and values in fp32. page: slots
    of a page. A query has whole pages only; the slots behind them are always read.
    """

    query_AND: Tensor
    key_HTD: Tensor
    value_HTE: Tensor
    at_A: Tensor
    scaling: float
    page: int

    @property
    def heads(self) -> int:
        """KV heads."""
        return len(self.key_HTD)

    @property
    def width(self) -> int:
        """Whole pages of all keys."""
        return self.key_HTD.shape[1] // self.page

    @property
    def pages_A(self) -> Tensor:
        """Whole pages of each query."""
        return (self.at_A + 1) // self.page

    @property
    def paged_HWSD(self) -> Tensor:
        """The keys of the whole pages."""
        end = self.width * self.page
        return self.key_HTD[:, :end].reshape(self.heads, self.width, self.page, -1)

    @property
    def table_RW(self) -> Tensor:
        """The pages of the rows of all queries: page w of head h is number h · W + w."""
        page_HW = torch.arange(self.heads * self.width, device=self.at_A.device).view(
            self.heads, -1
        )
        return page_HW.repeat(len(self.at_A), 1).int()

    @property
    def pages_R(self) -> Tensor:
        """How many of them a row has."""
        return self.pages_A.repeat_interleave(self.heads)

    @property
    def rows(self) -> RowPages:
        """Both, as operators take them."""
        return RowPages(self.table_RW, self.pages_R)

    def logits(self) -> Tensor:
        """fp32 `[A, N, T]`; −∞ behind a query."""
        group = self.query_AND.shape[1] // self.heads
        key_NTD = self.key_HTD.repeat_interleave(group, 0)
        logit_ANT = torch.einsum("and,ntd->ant", self.query_AND, key_NTD) * self.scaling
        token_T = torch.arange(self.key_HTD.shape[1], device=self.at_A.device)
        return logit_ANT.masked_fill(token_T > self.at_A[:, None, None], -torch.inf)

    def bounds(self, box_H2WD: Tensor, query_AND: Tensor | None = None) -> Tensor:
        """What boxes `[H, 2, W, D]` say of each page: `[A, N, W]`."""
        box_P2D = box_H2WD.transpose(1, 2).flatten(0, 1).contiguous()
        query = self.query_AND if query_AND is None else query_AND
        return ops.score_pages(query, box_P2D, self.rows)

    def beside(self) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, lengths and cells of all pages, as the engine makes them."""
        end = self.width * self.page
        sides = [
            x[:, :end].reshape(-1, self.page, x.shape[2]) for x in (self.key_HTD, self.value_HTE)
        ]
        widths = [x.shape[2] for x in sides]
        whole = [
            torch.arange(n, dtype=torch.int16, device=self.at_A.device).expand(len(sides[0]), -1)
            for n in widths
        ]
        channels = [x.contiguous() for x in whole]
        key, value = widths
        layout = PageLayout(self.page, key, value, key, value, 16, 16, 32, 32, 4)
        page_PX = ops.pack(*sides, *channels, list(layout))
        return ops.page_bounds(page_PX, *channels, list(layout), self.key_HTD, BITS)


def seen_of(given: Given, queries: int, page: int) -> Seen:
    """So many queries of the second half of a prompt, evenly spread; one: the last."""
    query_NQD, key_HTD, value_HTE = (x[0].float() for x in given[:3])
    tokens = key_HTD.shape[1]
    ends, device = (tokens - 1, tokens // 2), key_HTD.device
    spread_A = torch.linspace(*ends, queries, dtype=torch.float64, device=device)
    at_A = spread_A.round().long()
    query_AND = query_NQD[:, at_A].transpose(0, 1).contiguous()
    return Seen(query_AND, key_HTD, value_HTE, at_A, given.scaling, page)


# The rankings: what each says of a page, `[A, N, W]`; larger is better.


def box(seen: Seen) -> Tensor:
    """The least and the largest key of every channel of a page: `[H, 2, W, D]`."""
    return torch.stack([seen.paged_HWSD.amin(2), seen.paged_HWSD.amax(2)], dim=1)


def bounds(seen: Seen) -> Tensor:
    """The largest product that a key in the box can have (Quest)."""
    return seen.bounds(box(seen))


def by_cells(seen: Seen) -> tuple[Tensor, Tensor]:
    """By the part of the box that each key is in: what the engine ranks by, and the bounds."""
    box_P2D, _, cell_PY = seen.beside()
    rows = seen.rows
    bound_ANW = ops.score_pages(seen.query_AND, box_P2D, rows)
    place_W = torch.arange(seen.width, dtype=torch.int32, device=seen.at_A.device)
    every = Places(place_W.expand(len(rows.pages_R), -1).contiguous(), rows.pages_R)
    operands = (seen.query_AND, box_P2D, cell_PY, rows, every, bound_ANW)
    return ops.score_cells(*operands, BITS, seen.page)


def mean_query(seen: Seen) -> Tensor:
    """The same of the mean query of the heads that share a KV head: no bound of any of them."""
    query_AHGD = seen.query_AND.view(len(seen.at_A), seen.heads, -1, seen.query_AND.shape[2])
    mean_AHGD = query_AHGD.mean(2, keepdim=True).expand_as(query_AHGD)
    return seen.bounds(box(seen), mean_AHGD.flatten(1, 2).contiguous())


def mean_radius(seen: Seen) -> Tensor:
    """A box as far around the centre as keys are on average (ArkVale), which may be left."""
    low_HWD, high_HWD = box(seen).unbind(1)
    centre_HWD = (low_HWD + high_HWD) / 2
    radius_HWD = (seen.paged_HWSD - centre_HWD[:, :, None]).abs().mean(2)
    return seen.bounds(torch.stack([centre_HWD - radius_HWD, centre_HWD + radius_HWD], dim=1))


def recency(seen: Seen) -> Tensor:
    """Later pages first."""
    place_W = torch.arange(seen.width, device=seen.at_A.device).float()
    return _held(seen, place_W.expand(*seen.query_AND.shape[:2], -1))


def by_chance(seen: Seen) -> Tensor:
    """Pages drawn anew for every row of every query."""
    generator = torch.Generator(seen.at_A.device).manual_seed(0)
    shape = (len(seen.at_A), seen.heads, seen.width)
    drawn_AHW = torch.rand(shape, generator=generator, dtype=torch.float32, device=seen.at_A.device)
    return _held(seen, drawn_AHW.repeat_interleave(seen.query_AND.shape[1] // seen.heads, 1))


def true_mass(seen: Seen) -> Tensor:
    """The attention of a page, summed over the heads that share it: what no ranking can know."""
    weight_ANT = seen.logits().softmax(-1)[..., : seen.width * seen.page]
    mass_ANW = weight_ANT.reshape(*weight_ANT.shape[:2], seen.width, seen.page).sum(-1)
    mass_AHGW = mass_ANW.view(len(seen.at_A), seen.heads, -1, seen.width)
    return _held(seen, mass_AHGW.sum(2, keepdim=True).expand_as(mass_AHGW).flatten(1, 2))


def _held(seen: Seen, score_ANW: Tensor) -> Tensor:
    """−∞ where a query has no whole page."""
    place_W = torch.arange(seen.width, device=seen.at_A.device)
    beyond_AW = place_W >= seen.pages_A[:, None]
    return score_ANW.masked_fill(beyond_AW[:, None], -torch.inf).contiguous()


OURS = "cells"
RANKINGS: Mapping[str, Callable[[Seen], Tensor]] = {
    OURS: lambda seen: by_cells(seen)[0],
    "bounds": bounds,
    "mean query": mean_query,
    "mean radius": mean_radius,
    "recency": recency,
    "random": by_chance,
    "true mass": true_mass,
}
