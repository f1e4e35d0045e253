"""The store of a layer: what it is made of, and how much room its rows get."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.formulas.page_layout import PageLayout
from kvpress.pipe.state import channels
from kvpress.pipe.state.context import Context
from kvpress.policy import formats
from kvpress.policy.budget import Limits
from kvpress.policy.recipe import Recipe
from kvpress.policy.retrieval import Retrieval
from kvpress.store import Column, FormattedRows, PagedRows, Rows, tiered_rows
from kvpress.store.base import KEY, MASS, VALUE
from kvpress.store.spans import SPAN
from kvpress.store.tiers.tiers import Tiers
from kvpress.types import LayerKind

_RECENT_SLOTS = 8  # of a page, at most, where recent slots are few and the others are packed


@dataclass(frozen=True)
class Stores:
    """How a layer makes its store."""

    recipe: Recipe
    limits: Limits | None
    page_slots: int
    cache_dtype: torch.dtype | None  # of keys and values; None: as they come
    layer: int = 0
    tiers: Tiers | None = None  # where old pages go; None: they stay on the device
    retrieval: Retrieval | None = None  # which pages a decode step reads; None: all

    @classmethod
    def of(cls, kind: LayerKind, context: Context, recipe: Recipe, limits: Limits | None) -> Stores:
        """How a layer of a cache does it. A window is small, and always read: it needs no tiers."""
        tiers = context.tiers if kind.window is None else None
        rule = recipe.stage("retrieve").retrieve(kind.index)
        return cls(recipe, limits, context.page_slots, context.cache_dtype, kind.index, tiers, rule)

    def new(self, key_BHQD: Tensor, value_BHQD: Tensor) -> Rows:
        """An empty store for tokens like these. Raises PolicyError where it cannot count them."""
        batch, heads, _, key_width = key_BHQD.shape
        columns = self.columns(key_BHQD.dtype, key_width, value_BHQD.shape[-1])
        if channels.biased(self.recipe):
            channels.check_biases(self.recipe, {key_BHQD.dtype, columns[KEY].dtype}, key_width)
        return self.empty(columns, batch, heads, key_BHQD.device)

    def empty(
        self, columns: dict[str, Column], batch: int, heads: int, device: torch.device
    ) -> Rows:
        """An empty store of these columns."""
        slots = self.recent_page(self.tiers is not None)
        rows, key = PagedRows(batch, heads, columns, slots, device), columns[KEY]
        if not self.packs:
            return rows
        widths = (key.shape[0], columns[VALUE].shape[0])
        layouts = self.layouts(widths, widths, key.dtype.itemsize)
        made_of = (rows, layouts, self.recipe.residual, self.ordered)
        if self.tiers is not None:
            return tiered_rows(*made_of, self.tiers, self.layer, self.together, self.cells)
        return FormattedRows(*made_of, cells=self.cells)

    def recent_page(self, tiered: bool) -> int:
        """Slots of a page of recent slots. tiered: whether old ones go to tiers."""
        few = self.recipe.formats and not tiered
        return min(self.page_slots, _RECENT_SLOTS) if few else self.page_slots

    @property
    def ordered(self) -> bool:
        """Whether nothing is ever dropped from pages of old slots."""
        return self.limits is None and not self.recipe.accumulates

    @property
    def together(self) -> int:
        """Slots that become old at once while tokens are decoded, at least, in tiers."""
        # What is quantised changes with when it is, and what is chosen with what is in pages; other
        # slots as they came may wait for a whole span.
        return SPAN if self.cells is None and not self.recipe.formats else 1

    def layouts(
        self, widths: tuple[int, int], kept: tuple[int, int], item_bytes: int
    ) -> list[PageLayout]:
        """How pages of old slots may lie that keep so many channels of keys and values."""
        packing, page = self.recipe.packing, self.page(widths[0])
        return formats.layouts(packing, widths, kept, item_bytes, self.has_short_rows, page)

    def kept(self, widths: tuple[int, int]) -> tuple[int, int]:
        """Channels of keys and values that old slots keep at most, those of two codes twice."""
        packing, (key, value) = self.recipe.packing, widths
        return key + (packing.boosted(key) if packing else 0), value

    def page(self, width: int) -> int | None:
        """Slots of a page of old slots; None: as many as its format wants."""
        return None if self.retrieval is None else self.retrieval.page_of(width)

    @property
    def cells(self) -> int | None:
        """Bits of the cells of keys, by which steps choose pages; None: they read all."""
        return None if self.retrieval is None else self.retrieval.cells

    @property
    def packs(self) -> bool:
        """Whether old slots are in whole pages: packed, or as they came to go to another tier."""
        return self.recipe.formats or self.tiers is not None or self.retrieval is not None

    @property
    def has_short_rows(self) -> bool:
        """Whether rows may stay so short that small pages of old slots are better.

        A row without a budget holds every token of its text.
        """
        return self.limits is not None and self.retrieval is None

    def columns(self, dtype: torch.dtype, key_width: int, value_width: int) -> dict[str, Column]:
        """What the store keeps of a slot. dtype: of the tokens."""
        columns = {
            KEY: Column((key_width,), self.cache_dtype or dtype, slot_last=True),
            VALUE: Column((value_width,), self.cache_dtype or dtype),
        }
        if self.recipe.accumulates:
            columns[MASS] = Column((), torch.float32, volatile=True)
        return columns

    @property
    def starts(self) -> dict[str, float]:
        """With what counters of a sequence begin."""
        sink, merging = self.limits.sink if self.limits else 0, self.recipe.merging
        starts: dict[str, float] = {"sink_B": sink, "guarded_B": sink}
        return starts if merging is None else starts | {"threshold_B": merging.initial}

    @property
    def headroom(self) -> int:
        """Slots by which rows may exceed their quota between two evictions."""
        return self.limits.interval if self.limits else 0

    @property
    def room(self) -> int:
        """Free slots that a refilled row gets at once; more pages come when they are needed."""
        return min(self.headroom, self.page_slots)

    def limit(self, rows: Rows | None, quota_BH: Tensor) -> None:
        """Tells rows how many pages they can ever need, where quotas do not grow."""
        limits = self.limits
        if rows is not None and limits is not None and limits.interval and not limits.grows:
            most_BH = quota_BH.clamp_max(2**40) + self.headroom
            rows.limit(int((-(-most_BH // rows.page_slots)).sum()))
