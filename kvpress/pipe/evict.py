"""Evicting from stored rows: back to their quotas."""

from __future__ import annotations

from torch import Tensor

from kvpress.formulas.ranking import drop_one
from kvpress.pipe.stages.absorb import compact
from kvpress.pipe.stages.observe import some
from kvpress.pipe.stages.select import protected, score, select
from kvpress.pipe.state.layer import Layer
from kvpress.policy.slots import Slots
from kvpress.store import Survivors


def evict(
    layer: Layer,
    group: list[int],
    slots: Slots,
    excess_bH: Tensor,
    continues_eviction: bool = False,
) -> None:
    """Brings every row back to its quota: by one overwrite each where one slot is over.

    continues_eviction: whether this is a part of the eviction before, for thresholds of merging.
    """
    layer.evicted_at = layer.columns_seen
    recipe = layer.recipe
    ordinary = recipe.merging is None and not recipe.stage("select").overrides("select")
    with layer.timed("select"):
        if ordinary and int(excess_bH.max()) == 1:
            victim_bH = drop_one(
                score(layer, slots), slots.position_BHS, protected(layer, slots, group)
            )
            over_r = (excess_bH > 0).flatten().nonzero().flatten()
            row_A = layer.rows.paging.table.row_index(group)[over_r]
            victim_A = victim_bH.flatten()[over_r.to(victim_bH.device)]
            layer.rows.evict_one(row_A, victim_A, some(layer, group))
            layer.excess.forget()
            return
        kept_BHS, counts_bH = select(layer, slots, group, layer.rows.counts_BH[group])
    columns = compact(layer, group, slots, kept_BHS, counts_bH, continues_eviction)
    with layer.timed("store"):
        layer.keep(Survivors(tuple(group), columns, counts_bH))
