"""What is recorded while attending: column sums of attention, and the masses that policies keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from kvpress import ops
from kvpress.formulas import sinks
from kvpress.formulas.sums import Observation, step_sums
from kvpress.host import lasting
from kvpress.ops import Logits, Noise, Reduction
from kvpress.pipe.state.channels import turned_query, turns
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import calibrated, gram
from kvpress.pipe.state.together import of_all
from kvpress.policy.slots import Queries, Slots
from kvpress.store.base import MASS, POSITION


def attend_and_sum(
    query_BNQD: Tensor,
    key_BHQD: Tensor,
    value_BHQE: Tensor,
    position_BHQ: Tensor,
    layer: int,
    observation: Observation,
    scaling: float,
    softcap: float,
    map_BNX: Tensor | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention output of a whole prompt and its `prompt_sums` over all queries, in one pass."""
    out_BNQE, sums_BNQ = ops.attend_sums(
        query_BNQD,
        key_BHQD,
        value_BHQE,
        position_BHQ,
        Logits(scaling, softcap),
        Noise(observation.noise, observation.tau, observation.seed, layer, first),
        map_BNX,
    )
    return out_BNQE, sums_BNQ if observation.weight == 1.0 else sums_BNQ * observation.weight


def prompt_sums(
    query_BNQD: Tensor,
    key_BHSD: Tensor,
    position_BHS: Tensor,
    layer: int,
    observation: Observation,
    scaling: float,
    softcap: float,
    map_BNX: Tensor | None = None,
    weight_BQ: Tensor | None = None,
    sink_N: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Attention of a prompt chunk summed over its queries, or its largest: fp32 `[B, N, S]`.

    The chunk's own tokens are the last Q slots, in order. With a map: over its blocks. weight_BQ:
    by which the weights of a query are multiplied before. sink_N: learned logits that take part in
    every softmax. first: number of the first query head in the model.
    """
    if sink_N is not None:
        states = sinks.with_slot(query_BNQD, key_BHSD, position_BHS, sink_N, scaling)
        query_BNQD, key_BHSD, position_BHS = states
    window, largest = observation.window, observation.kind == "max"
    sums_BNS = ops.attention_sums(
        query_BNQD,
        key_BHSD,
        position_BHS,
        Logits(scaling, softcap),
        Reduction(query_BNQD.shape[2] if window is None else window, largest, weight_BQ),
        Noise(observation.noise, observation.tau, observation.seed, layer, first),
        map_BNX,
    )
    if sink_N is not None:
        sums_BNS = sums_BNS[..., 1:]
    return sums_BNS if largest or observation.weight == 1.0 else sums_BNS * observation.weight


@lasting
def recall(layer: Layer, group: Sequence[int], query_bNQD: Tensor) -> None:
    """Keeps the last queries of some sequences, where scores are shown them while decoding."""
    for i, b in enumerate(group):
        layer.sequences.recalled.add(b, query_bNQD[i], layer.recalled)


def _recalled(layer: Layer, group: list[int]) -> Queries | None:
    """The last queries of some sequences, where they are kept."""
    most = layer.recalled
    if not most:
        return None
    query_bNQD = turned_query(layer.sequences.recalled.last(group, most), layer.recipe)  # back
    return Queries(query_bNQD, *layer.logits)


def stored(layer: Layer, group: list[int], seen_b: Tensor) -> Slots:
    """The slots of some sequences as they are stored, after `seen_b` tokens."""
    rows, part = layer.rows, some(layer, group)
    return Slots(
        layer=layer.kind.index,
        position_BHS=rows.dense(POSITION, part).long(),
        seen_B=seen_b.to(rows.device),
        new_tokens=1,
        fetch=partial(rows.dense, sequences=part),
        mass_BHS=rows.dense(MASS, part) if layer.recipe.accumulates else None,
        key_width=layer.key_width,
        asked=_recalled(layer, group),
        rotation=layer.rotation,
        turned=turns(layer.recipe),
        gram_NEF=gram(layer),
        calibrated=calibrated(layer),
        gather=partial(of_all, layer),
        first=layer.kind.first,
    )


def observe(
    layer: Layer,
    group: list[int],
    weights_bN1S: Tensor | None,
    request: Observation | None,
    seen_b: Tensor,
) -> Slots:
    """The slots with what the policy asked to observe; what it accumulates is written back.

    weights_bN1S: of the token that is number `seen_b` of its sequence, where they were asked for;
    those of the layer's sinks first, if it has any.
    """
    rows, slots = layer.rows, stored(layer, group, seen_b)
    if request is not None and weights_bN1S is not None:
        first = int(layer.kind.sink)
        position = F.pad(slots.position_BHS, (first, 0), value=sinks.POSITION)
        weights_bNS = weights_bN1S[:, :, 0, : position.shape[-1]]
        index, seen_B = layer.kind.index, slots.seen_B
        before = layer.kind.first * (weights_bNS.shape[1] // layer.kind.heads)
        given = (weights_bNS, position, seen_B, index, request, before)
        sums_BHS = step_sums(*given)[..., first:]
        slots = replace(slots, attention_BHS=sums_BHS)
    if layer.recipe.gathers:
        mass_BHS = layer.recipe.stage("accumulate").accumulate(slots).float()
        rows.write(MASS, mass_BHS, some(layer, group))
        slots = replace(slots, mass_BHS=mass_BHS)
    return slots


def some(layer: Layer, group: list[int]) -> list[int] | None:
    """The group for the store, or None for everybody, which saves the store an index."""
    return None if len(group) == len(layer.sequences) else group
