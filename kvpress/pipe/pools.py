"""Prompts that are held whole until they have passed all layers: then all rows are evicted at once.

So it is where rows of the whole model compete for the budget by their scores, and where a prompt is
looked at a second time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpress.formulas.apportion import by_score
from kvpress.formulas.ranking import matched
from kvpress.pipe.evict import evict
from kvpress.pipe.stages.allocate import compressed, fit, limits_of, portions, set_portions, write
from kvpress.pipe.stages.format import pack_due
from kvpress.pipe.stages.observe import stored
from kvpress.pipe.stages.select import finite, protected, score
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import geometry
from kvpress.pipe.state.together import evicting, of_all, ranks
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.pooling import thins
from kvpress.policy.slots import Slots
from kvpress.types import EMPTY


@torch.no_grad()
def compress(layer: Layer, group: Sequence[int]) -> None:
    """Brings the rows of some sequences in all layers to their quotas, the scores being known."""
    if not group or layer.limits is None:
        return
    settle(layer, group)
    finish(layer, group)


def finish(layer: Layer, group: Sequence[int]) -> None:
    """Brings the rows of some sequences in all layers to the quotas that they have."""
    for other in compressed(layer):
        bring(other, list(group))
    end(layer)


def over(layer: Layer, group: Sequence[int]) -> bool:
    """Whether some row of these sequences, in any layer and process, is above its quota."""
    rows = list(group)
    pairs = ((x.rows.counts_BH[rows], x.sequences.quota_BH[rows]) for x in compressed(layer))
    return ranks(layer).any(any(bool((held > quota).any()) for held, quota in pairs))


@torch.no_grad()
def settle(layer: Layer, group: Sequence[int]) -> None:
    """Gives the rows of some sequences their quotas, where they compete for them."""
    if layer.recipe.pool is None:
        return
    layers, rows = compressed(layer), list(group)
    shown = [stored(other, rows, other.sequences.seen_B[rows]) for other in layers]
    scores = [_scores(*of, rows) for of in zip(layers, shown, strict=True)]
    parts = [slice(i, i + 1) for i in range(len(layers))]
    if layer.recipe.pool.scope == "model":
        parts = [slice(None)]
    for part in parts:
        compete(layers[part], shown[part], scores[part], rows)


@torch.no_grad()
def bring(layer: Layer, rows: list[int], reference: Tokens | None = None) -> None:
    """Brings the rows of some sequences in a layer to their quotas.

    reference: of one sequence, tokens to whose queries what stays is fitted.
    """
    slots = stored(layer, rows, layer.sequences.seen_B[rows])
    score_bHS = _scores(layer, slots, rows)
    layer.mark_dirty()
    with layer.rows.memory.lock:
        excess_bH = layer.rows.counts_BH[rows] - layer.sequences.quota_BH[rows]
        if evicting(layer, bool((excess_bH > 0).any())):
            evict(layer, rows, slots, excess_bH, score_bHS=score_bHS, reference=reference)
        if layer.stores.packs:
            pack_due(layer, dict(zip(rows, layer.sequences.seen_B[rows].tolist(), strict=True)))


def end(layer: Layer) -> None:
    """Says that all layers are at their quotas."""
    layer.context.pending.clear()
    layer.context.held, layer.context.dirty = set(), None


def _scores(layer: Layer, slots: Slots, group: list[int]) -> Tensor:
    """The scores of stored slots, `[b, H, S]`: those made with the prompt, or new ones."""
    pending = layer.context.pending.get(layer.kind.index)
    if not pending:
        return finite(layer, slots, group, score(layer, slots))
    score_bHS = torch.full_like(slots.position_BHS, -torch.inf, dtype=torch.float32)
    for some, position_bHS, given_bHS in pending:
        both = [b for b in some if b in group]
        given, where = [some.index(b) for b in both], [group.index(b) for b in both]
        found = (given_bHS[given], position_bHS[given], slots.position_BHS[where])
        score_bHS[where] = matched(*found, -torch.inf)
    return score_bHS


def compete(
    layers: Sequence[Layer],
    shown: Sequence[Slots],
    scores: Sequence[Tensor],
    group: Sequence[int],
) -> None:
    """Gives the rows of these layers quotas by the scores of their slots, sequence by sequence."""
    guarded = [protected(*of, group) for of in zip(layers, shown, strict=True)]
    held = [slots.position_BHS != EMPTY for slots in shown]
    held, guarded, scores = (_of_all(layers, x) for x in (held, guarded, scores))
    for i, b in enumerate(group):
        held_XS = _rows([x[i] for x in held])
        open_XS = held_XS & ~_rows([x[i] for x in guarded])
        _compete(layers, _rows([x[i] for x in scores]), open_XS, held_XS.sum(-1).cpu(), b)


def _of_all(layers: Sequence[Layer], parts: Sequence[Tensor]) -> list[Tensor]:
    """What was found of the rows of every layer, with the rows of other processes."""
    return [of_all(layer, part) for layer, part in zip(layers, parts, strict=True)]


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """The rows of some layers `[H, S]` one below the other, as wide as the widest."""
    width = max(x.shape[1] for x in parts)
    return torch.cat([pad(x, (0, width - x.shape[1])) for x in parts])


def _compete(
    layers: Sequence[Layer], score_XS: Tensor, open_XS: Tensor, held_X: Tensor, b: int
) -> None:
    first, pool = layers[0], layers[0].recipe.pool
    assert pool is not None, "only recipes with a pool compete"
    limits, seen, shape = limits_of(first, b), int(first.sequences.seen_B[b]), geometry(first)
    even = min(limits.quota(seen, shape).slots, seen)  # without bounds it cannot be added up
    guarded_X = held_X - open_XS.sum(-1).cpu()
    if thins(pool):
        open_XS = open_XS & (score_XS > pool.above)
    elif bool((held_X <= even).all()):
        return
    places = int((even - guarded_X).clamp_min(0).sum())
    own_X = (int(pool.least * even) - guarded_X).clamp_min(0)
    slots_X = guarded_X + by_score(score_XS, open_XS, places, own_X.to(open_XS.device)).cpu()
    sizes = [layer.kind.of_all for layer in layers]
    if limits.budget.unit == "bytes":
        slots_X = fit(slots_X.double().clamp_min(1), limits, seen, shape, sizes)
    slots_X = slots_X.clamp_min(1)
    parts = (torch.split(x, sizes) for x in (slots_X, portions(slots_X)))
    for layer, slots_R, portion_R in zip(layers, *parts, strict=True):
        # Of its own slots, as while decoding: what is protected twice now may be two tokens then.
        write(layer, [b], [[limits.row(int(n)) for n in layer.kind.own(slots_R)]])
        if layer.grows:
            set_portions(layer, [b], [layer.kind.own(portion_R).tolist()])
