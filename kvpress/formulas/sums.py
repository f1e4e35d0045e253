"""What is recorded while attending, and how the sums over a prompt or a step are made."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpress.errors import OperatorError
from kvpress.formulas.noise import NO_QUERY, gumbel
from kvpress.types import NoiseKind, Reduced


class Observation(NamedTuple):
    """Column sums of softmax attention, in fp32, or its largest weights.

    window: how many of the last queries of a prompt are summed; None sums all of them. A decode
    step has one. noise: Gumbel noise on the logits, drawn once per key ("frozen") or per query and
    key ("fresh"). tau: temperature of the softmax. The attention output itself is never touched by
    either. weight: how many queries each summed one stands for; a maximum does not depend on it.
    kind: what becomes of the weights that a slot receives, of all queries and of the query group:
    their sum, or the largest ("max"; without noise, tau = 1). relative: weights are multiplied by
    the norm of what the value adds to the hidden state, and divided by that of the hidden state; of
    probes only.
    """

    window: int | None = None
    noise: NoiseKind = "none"
    tau: float = 1.0
    seed: int = 0
    weight: float = 1.0
    kind: Reduced = "sum"
    relative: bool = False


def over_group(sums_BNS: Tensor, heads: int, kind: Reduced = "sum") -> Tensor:
    """Sums over the query group of each KV head, or the largest of it: `[B, H, S]`."""
    batch, _, slots = sums_BNS.shape
    sums_BHGS = sums_BNS.view(batch, heads, -1, slots)
    return sums_BHGS.sum(2) if kind == "sum" else sums_BHGS.amax(2)


def step_sums(
    weights_BNS: Tensor,
    position_BHS: Tensor,
    seen_B: Tensor,
    layer: int,
    observation: Observation,
    first: int = 0,
) -> Tensor:
    """Attention of one decoded token, from its softmax weights, summed over the query group.

    Or its largest weight there. fp32 `[B, H, S]`. The logarithm of a weight is its logit up to a
    constant, which a softmax ignores. first: number of the first query head in the model. Raises
    OperatorError for a maximum with noise.
    """
    batch, heads, slots = position_BHS.shape
    weights_BHGS = weights_BNS.reshape(batch, heads, -1, slots)
    plain = observation.noise == "none" and observation.tau == 1.0
    if observation.kind == "max":
        if not plain:
            raise OperatorError(f"{observation}: the largest weights are those without noise.")
        return over_group(weights_BNS, heads, "max")
    if plain:
        return weights_BHGS.sum(2) * observation.weight
    logits = weights_BHGS.log()
    if observation.noise != "none":
        group = weights_BHGS.shape[2]
        head_N = torch.arange(heads * group, device=logits.device) + first
        head_HG1 = head_N.view(heads, group, 1)
        position_BH1S = position_BHS[:, :, None]
        query_B111 = (seen_B - 1).view(-1, 1, 1, 1)
        if observation.noise == "frozen":
            query_B111 = torch.full_like(query_B111, NO_QUERY)
        logits += gumbel(observation.seed, layer, head_HG1, query_B111, position_BH1S)
    noisy = torch.softmax(logits / observation.tau, dim=-1)
    return noisy.nan_to_num_().sum(2) * observation.weight  # a row without a slot has no weights
