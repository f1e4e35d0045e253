"""Trains a head: its scores shall be the target's attention to what a step chooses from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from kvpress.bench.distill.maps import Always, Map
from torch import Tensor

from kvpress.hf.heads.distilled import Sizes, projected, token_features, windows

_BETA, _BETA2, _EPS = 0.9, 0.98, 1e-8  # of Adam (Kingma and Ba, arXiv 1412.6980)
_DECAY = 0.01  # of weights, times the learning rate (Loshchilov and Hutter, arXiv 1711.05101)
_WARM = 0.05  # of the steps, in which the rate grows


@dataclass(frozen=True, kw_only=True)
class How:
    """How a head is trained. queries: of a context that a step looks at."""

    steps: int = 300
    rate: float = 2e-3
    queries: int = 128
    seed: int = 0


class State(NamedTuple):
    """Weights, the moments of their gradients, and how many steps were taken."""

    weights: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    done: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, for a file."""
        parts = zip(("weights", "first", "second"), self[:3], strict=True)
        return {f"{part}.{name}": x for part, named in parts for name, x in named.items()}

    @staticmethod
    def begun(weights: dict[str, Tensor]) -> State:
        """No step was taken yet."""
        first, second = (
            {name: torch.zeros_like(x) for name, x in weights.items()} for _ in range(2)
        )
        return State(weights, first, second)

    @staticmethod
    def of(tensors: Mapping[str, Tensor], done: int) -> State:
        """What `tensors` gave."""
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "first": {}, "second": {}}
        for key, x in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = x
        return State(parts["weights"], parts["first"], parts["second"], done)


def loss_of(
    sizes: Sizes,
    weights: Mapping[str, Tensor],
    embedding: Callable[[Tensor], Tensor],
    seen: Map,
    always: Always,
) -> Tensor:
    """The cross-entropy of a head's scores and the target's attention, weighed by its mass.

    The scores of a KV head are the maximum over its query heads, as `scores` makes them, made a
    distribution. Weighed by mass: a query that reads hardly anything far back has nothing to lose.
    """
    tokens = len(seen.id_T)
    word_Y, place_T = torch.unique(seen.id_T, return_inverse=True)  # most words come more than once
    with torch.no_grad():
        embedded_YX = embedding(word_Y).float()
    features_1TC = token_features(weights, embedded_YX)[place_T][None]
    padded_1TC = torch.nn.functional.pad(features_1TC, (0, 0, sizes.reach, 0))
    seen_1TX = windows(sizes, padded_1TC)
    position_1T = torch.arange(tokens, device=seen.id_T.device)[None]
    turned = sizes.width, sizes.rotation(seen.id_T.device)
    key_HTD = projected(weights, seen_1TX, position_1T, "key", *turned)[0]
    at_A = seen.at_A
    query_NAD = projected(weights, seen_1TX[:, at_A], at_A[None], "query", *turned)[0]
    query_HGAD = torch.unflatten(query_NAD, 0, (sizes.heads, sizes.group))
    scaled_HGAD = query_HGAD / math.sqrt(sizes.width)
    logit_HGAT = scaled_HGAD @ key_HTD[:, None].transpose(-1, -2)
    out_AT = ~always.chosen_from(at_A, tokens)
    logit_HGAT = logit_HGAT.masked_fill(out_AT, -1e9)
    best_HAT = logit_HGAT.log_softmax(-1).amax(1)
    own_HAT = best_HAT.log_softmax(-1).masked_fill(out_AT, 0.0)
    mass_HAT = seen.mass_HAT.float()
    loss: Tensor = -(mass_HAT * own_HAT).sum() / mass_HAT.sum()
    return loss


def train(
    sizes: Sizes,
    state: State,
    maps: Sequence[Map],
    embedding: Callable[[Tensor], Tensor],
    always: Always,
    how: How,
    on_step: Callable[[State, float], None] = lambda *_: None,
) -> State:
    """Goes on until all steps are taken. on_step: gets the state, which goes on changing.

    What a step looks at follows from the seed and its number alone: a training that was interrupted
    takes the steps that it would have taken.
    """
    for step in range(state.done, how.steps):
        generator = torch.Generator().manual_seed(how.seed * 1_000_003 + step)
        number = int(torch.randint(len(maps), (), generator=generator))
        whole = maps[number]
        some = torch.randperm(len(whole.at_A), generator=generator)[: how.queries].sort().values
        seen = whole._replace(at_A=whole.at_A[some], mass_HAT=whole.mass_HAT[:, some])
        weights = {name: x.detach().requires_grad_() for name, x in state.weights.items()}
        loss = loss_of(sizes, weights, embedding, seen, always)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: x.grad for name, x in weights.items()}
        state = _stepped(state, gradients, _rate(how, step))
        on_step(state, float(loss.detach()))
    return state


def _rate(how: How, step: int) -> float:
    """The learning rate of a step: it grows from nothing, and falls to nothing as a cosine."""
    warm = max(1, round(_WARM * how.steps))
    if step < warm:
        return how.rate * (step + 1) / warm
    return how.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, how.steps - warm)))


@torch.no_grad()
def _stepped(state: State, gradients: Mapping[str, Any], rate: float) -> State:
    """One step of Adam with decoupled weight decay."""
    done = state.done + 1
    for name, weight in state.weights.items():
        gradient = gradients[name]
        first = state.first[name].mul_(_BETA).add_(gradient, alpha=1 - _BETA)
        second = state.second[name].mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        scale = (second / (1 - _BETA2**done)).sqrt_().add_(_EPS)
        weight.mul_(1 - rate * _DECAY).addcdiv_(first, scale, value=-rate / (1 - _BETA**done))
    return state._replace(done=done)
