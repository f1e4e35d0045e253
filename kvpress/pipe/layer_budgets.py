"""Budgets of layers that depend on what every layer attends to in a prompt.

A layer that has attended knows its own demand, but not those of the layers behind it: until a
prompt has passed all of them it keeps the most that it can come to get. Then all are trimmed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress import host
from kvpress.pipe.evict import evict
from kvpress.pipe.stages.allocate import compressed, set_quotas
from kvpress.pipe.stages.observe import stored
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import geometry
from kvpress.pipe.state.together import evicting, of_all
from kvpress.policy.layer_shares import Division
from kvpress.policy.recipe import Recipe
from kvpress.policy.slots import Slots
from kvpress.types import EMPTY

_BUDGETS = "Layer budgets:"


def check_division(recipe: Recipe, layers: int) -> None:
    """Raises PolicyError where a policy cannot divide its budget among so many layers."""
    if recipe.shares and recipe.limits is not None and recipe.limits.budget.relative:
        nothing_known = host.full((1, layers), torch.nan, dtype=torch.float64)
        kept = host.tensor([float(recipe.limits.budget.amount)], dtype=torch.float64)
        _portions(recipe, nothing_known, kept, torch.zeros_like(kept))


def foresee(layer: Layer, group: Sequence[int], seen_b: Tensor) -> None:
    """Raises PolicyError, before anything changes, if a prompt has no division of the budget.

    seen_b: tokens of the sequences after it.
    """
    layers = compressed(layer)
    if layer is layers[0] and group:
        nothing_known = host.full((len(group), len(layers)), torch.nan, dtype=torch.float64)
        _portions(layer.recipe, nothing_known, *_kept(layer, seen_b))


def plan(layer: Layer, group: Sequence[int], slots: Slots) -> None:
    """Notes the demand of a layer that has attended, and bounds its rows for the time being."""
    assert slots.attention_BNS is not None, "a policy with demands observes"
    policy = layer.recipe.stage("share")
    observed_BNS = of_all(layer, slots.attention_BNS)
    position_BHS = of_all(layer, slots.position_BHS, EMPTY)
    new_b = policy.demand(observed_BNS, position_BHS).double().cpu()
    rows, seen_b = list(group), layer.sequences.seen_B[list(group)].double()
    old_b = layer.sequences.demand_B[rows]  # of the chunks before: each counts by its tokens
    part_b = slots.new_tokens / seen_b
    layer.sequences.demand_B[rows] = torch.where(
        old_b.isnan(), new_b, old_b * (1 - part_b) + new_b * part_b
    )
    layers = compressed(layer)
    place = layers.index(layer)
    portion_bL = _divide(layers, group, known=place + 1)
    set_quotas(layer, group, layer.sequences.seen_B[rows], portion_bL[:, place].tolist())


def trim(layer: Layer, group: Sequence[int]) -> None:
    """Brings all layers to their budgets after a prompt; called by the last one that attends."""
    layers = compressed(layer)
    if layer is not layers[-1] or layer.limits is None or not group:
        return
    portion_bL, lasting_bL = _divide(layers, group, known=len(layers)), _lasting(layers, group)
    for place, other in enumerate(layers):
        other.mark_dirty()
        with other.rows.memory.lock:
            seen_b = other.sequences.seen_B[list(group)]
            own = other.sequences
            own.portion_R = own.portion_R.clone()  # growths tell by the tensor
            own.portion_BH[list(group)] = lasting_bL[:, place, None]
            set_quotas(other, group, seen_b, portion_bL[:, place].tolist())
            for continues_eviction in (True, False):
                part = [b for b in group if (b in other.evicted_in_prompt) == continues_eviction]
                _evict(other, part, continues_eviction)
    _explain(layers, group)


def _divide(layers: list[Layer], group: Sequence[int], known: int) -> Tensor:
    """The portions of all layers, `[b, L]`, by the demands of the first `known` ones."""
    last = layers[known - 1]
    return _portions(
        last.recipe,
        _demands(layers, group, known),
        *_kept(last, last.sequences.seen_B[list(group)]),
    )


def _lasting(layers: list[Layer], group: Sequence[int]) -> Tensor:
    """The portions of all layers of what is seen while decoding, `[b, L]`.

    Protected tokens take nothing from other layers: the more is seen, the less they matter.
    """
    recipe, demand_bL = layers[0].recipe, _demands(layers, group, len(layers))
    if recipe.limits is None or not recipe.limits.grows:
        return torch.ones_like(demand_bL)
    kept_b = host.full((len(group),), float(recipe.limits.budget.amount), dtype=torch.float64)
    return _portions(recipe, demand_bL, kept_b, torch.zeros_like(kept_b))


def _demands(layers: list[Layer], group: Sequence[int], known: int) -> Tensor:
    """The demands of the first `known` layers: `[b, L]`, NaN for the others."""
    demand_bL = host.full((len(group), len(layers)), torch.nan, dtype=torch.float64)
    for i, other in enumerate(layers[:known]):
        demand_bL[:, i] = other.sequences.demand_B[list(group)]
    return demand_bL


def _portions(recipe: Recipe, demand_BL: Tensor, kept_B: Tensor, least_B: Tensor) -> Tensor:
    """What layers keep, in multiples of the budget: `[B, L]`."""
    policy = recipe.stage("share")
    return Division.of(policy).portions(policy.share(demand_BL), kept_B, least_B)


def _kept(layer: Layer, seen_b: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the tokens that the budget keeps, and the least that any layer must: fp64."""
    assert layer.limits is not None, "only layers with a budget share one"
    limits, shape = layer.limits, geometry(layer)
    sizes = [(limits.budget.slots(n, shape), limits.least_slots(n, shape)) for n in seen_b.tolist()]
    kept_b2 = host.tensor(sizes, dtype=torch.float64) / seen_b.clamp_min(1)[:, None]
    kept_b, least_b = kept_b2.clamp_max(1).unbind(1)
    return kept_b, least_b


@torch.no_grad()
def _evict(layer: Layer, group: list[int], continues_eviction: bool) -> None:
    """continues_eviction: whether the prompt evicted already, and the trim belongs to that."""
    excess_bH = layer.rows.counts_BH[group] - layer.sequences.quota_BH[group]
    if evicting(layer, bool((excess_bH > 0).any())):
        slots = stored(layer, group, layer.sequences.seen_B[group])
        evict(layer, group, slots, excess_bH, continues_eviction)


def _explain(layers: list[Layer], group: Sequence[int]) -> None:
    """A line for the report: what layers keep of the first of the prompts."""
    first, limits = group[0], layers[-1].limits
    assert limits is not None, "only layers with a budget are trimmed"
    seen = int(layers[-1].sequences.seen_B[first])
    kept = [int(layer.rows.counts_BH[first].sum()) / layer.kind.heads for layer in layers]
    mean, ledger = sum(kept) / len(kept), layers[-1].context.ledger
    ledger.withdraw(_BUDGETS)  # of the chunk or turn before
    ledger.note(
        f"{_BUDGETS} of a prompt of {seen} tokens layers keep {min(kept):.0f} to {max(kept):.0f},"
        f" {mean / max(seen, 1):.1%} on average (budget {limits.budget})."
    )
