"""Evicting from stored rows: back to their quotas."""

from __future__ import annotations

from torch import Tensor

from kvpress.formulas.ranking import drop_one
from kvpress.pipe.stages.absorb import compact
from kvpress.pipe.stages.observe import some
from kvpress.pipe.stages.refit import refit
from kvpress.pipe.stages.select import finite, protected, score, select
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.slots import Slots
from kvpress.store import Survivors


def evict(
    layer: Layer,
    group: list[int],
    slots: Slots,
    excess_bH: Tensor,
    continues_eviction: bool = False,
    score_bHS: Tensor | None = None,
    reference: Tokens | None = None,
) -> None:
    """Brings every row back to its quota: by one overwrite each where one slot is over.

    continues_eviction: whether this is a part of the eviction before, for thresholds of merging.
    score_bHS: where the slots were scored already. reference: of one sequence, tokens to whose
    queries what stays is fitted.
    """
    layer.evicted_at = layer.columns_seen
    recipe = layer.recipe
    ordinary = recipe.merging is None and not recipe.stage("select").overrides("select")
    ordinary = ordinary and reference is None
    with layer.timed("select"):
        given_bHS = score(layer, slots) if score_bHS is None else score_bHS
        if ordinary and int(excess_bH.max()) == 1:
            victim_bH = drop_one(given_bHS, slots.position_BHS, protected(layer, slots, group))
            over_r = (excess_bH > 0).flatten().nonzero().flatten()
            row_A = layer.rows.paging.table.row_index(group)[over_r]
            victim_A = victim_bH.flatten()[over_r.to(victim_bH.device)]
            layer.rows.evict_one(row_A, victim_A, some(layer, group))
            layer.excess.forget()
            return
        given_bHS = finite(layer, slots, group, given_bHS)
        kept_BHS, counts_bH = select(layer, slots, given_bHS, group, layer.rows.counts_BH[group])
    columns = compact(layer, group, slots, kept_BHS, counts_bH, continues_eviction)
    if reference is not None:
        stays_bHS = protected(layer, slots, group)
        columns |= refit(layer, reference, slots, kept_BHS, stays_bHS, columns)
    with layer.timed("store"):
        layer.keep(Survivors(tuple(group), columns, counts_bH))
