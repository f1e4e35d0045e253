"""The decode step of one layer: append, attend over the pages, observe, evict what is over."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvpress import ops
from kvpress.layer import Layer, Tokens
from kvpress.observe import Observation, step_sums
from kvpress.select import drop_one, gather, kept_index
from kvpress.store import Survivors
from kvpress.store.base import KEY, MASS, POSITION, VALUE
from kvpress.types import Slots


@torch.no_grad()
def run_decode(layer: Layer, tokens: Tokens, before_B: Tensor) -> Tensor:
    """Attention output `[B, N, 1, D]` of one new token per sequence; rows end at their quotas."""
    rows, meter, device = layer.rows, layer.run.meter, tokens.key_BHPD.device
    layer.decoded += 1
    with meter.stage("store", device):
        layer.append(tokens, before_B)
    excess_BH = rows.counts_BH - layer.quota_BH
    evicts = layer.due and bool((excess_BH > 0).any())
    looks = evicts or layer.recipe.accumulates
    request = layer.recipe.stage("observe").observe(layer.step()) if looks else None
    with meter.stage("decode attention", device):
        out_BN1D, weights_BNS = _attend(layer, tokens, request is not None)
    if not looks:
        return out_BN1D
    with meter.stage("observe", device):
        slots = _observe(layer, weights_BNS, request)
    if evicts:
        with meter.stage("select", device):
            _evict(layer, slots, excess_BH)
    return out_BN1D


def _attend(layer: Layer, tokens: Tokens, need_weights: bool) -> tuple[Tensor, Tensor]:
    """Output and weights; zeros for a sequence whose new column is padding."""
    rows = layer.rows
    out_BN1D, _, weights_BN1S = ops.decode_rows(
        tokens.query_BNPD,
        rows.pool(KEY),
        rows.pool(VALUE),
        *rows.operands(),
        tokens.scaling,
        tokens.softcap,
        need_weights,
    )
    if tokens.valid_BP is not None:
        idle_B111 = ~tokens.valid_BP.to(out_BN1D.device)[:, :, None, None]
        out_BN1D = out_BN1D.masked_fill(idle_B111, 0)
        if need_weights:
            weights_BN1S = weights_BN1S.masked_fill(idle_B111, 0)
    return out_BN1D, weights_BN1S[:, :, 0] if need_weights else weights_BN1S


def _observe(layer: Layer, weights_BNS: Tensor, request: Observation | None) -> Slots:
    """The slots with what the policy asked to observe; what it accumulates is written back."""
    rows, accumulates = layer.rows, layer.recipe.accumulates
    slots = Slots(
        layer=layer.kind.index,
        position_BHS=rows.dense(POSITION).long(),
        seen_B=layer.seen_B.to(rows.device),
        new_tokens=1,
        fetch=rows.dense,
        mass_BHS=rows.dense(MASS) if accumulates else None,
    )
    if request is not None:
        sums_BHS = step_sums(
            weights_BNS, slots.position_BHS, slots.seen_B, layer.kind.index, request
        )
        slots = replace(slots, attention_BHS=sums_BHS)
    if accumulates:
        mass_BHS = layer.recipe.stage("accumulate").accumulate(slots).float()
        rows.write(MASS, mass_BHS)
        slots = replace(slots, mass_BHS=mass_BHS)
    return slots


def _evict(layer: Layer, slots: Slots, excess_BH: Tensor) -> None:
    """Brings every row back to its quota: by one overwrite each where one slot is over."""
    layer.evicted_at = layer.columns_seen
    everyone = list(range(len(layer.seen_B)))
    ordinary = "select" not in layer.recipe.stage("select").replaces()
    if ordinary and int(excess_BH.max()) == 1:
        score_BHS = layer.recipe.stage("score").score(slots)
        victim_BH = drop_one(score_BHS, slots.position_BHS, layer.protected(slots, everyone))
        layer.rows.evict_one(victim_BH.flatten(), (excess_BH > 0).flatten())
        return
    kept_BHS, counts_BH = layer.select(slots, everyone, layer.rows.counts_BH)
    index_BHK = kept_index(kept_BHS, counts_BH)
    columns = {name: gather(slots.fetch(name), index_BHK) for name in layer.rows.columns}
    layer.refill([Survivors(tuple(everyone), columns, counts_BH)])
