"""What stays of a sequence's rows, fitted to what all slots gave to reference queries."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.formulas.fitting import Seen, fit_values, fit_weights, see
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.refit import Refit
from kvpress.policy.slots import Slots
from kvpress.store.base import KEY, VALUE
from kvpress.types import EMPTY

_Row = tuple[Tensor, Tensor]  # keys [K, D] with their biases, and values [K, E]


def refit(
    layer: Layer,
    reference: Tokens,
    slots: Slots,
    kept_1HS: Tensor,
    fixed_1HS: Tensor,
    columns: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The keys, with their biases, and the values of the slots that stay of one sequence.

    reference: tokens behind the text, to whose queries they are fitted. kept_1HS: the slots that
    stay. fixed_1HS: those that stay as they are. columns: the survivors, which are not changed.
    Rows that lose nothing, or of which only fixed slots stay, stay as they are.
    """
    if KEY not in columns:
        layer.context.ledger.note(
            "Slots that were packed before the last prompt are never written again: what stayed of"
            " it was not fitted."
        )
        return {}
    with layer.timed("refit"):
        key_1HSD, value_1HSE = slots.fetch(KEY), slots.fetch(VALUE)
        key_1HKD, value_1HKE = columns[KEY].clone(), columns[VALUE].clone()
        held_1HS = slots.position_BHS != EMPTY
        for h in range(layer.kind.heads):
            held_S, free_S = held_1HS[0, h], kept_1HS[0, h] & ~fixed_1HS[0, h]
            if held_S.equal(kept_1HS[0, h]) or not bool(free_S.any()):
                continue
            row = (key_1HSD[0, h, held_S], value_1HSE[0, h, held_S])
            parts = (free_S[held_S], fixed_1HS[0, h, held_S])
            seen = see(
                _queries(layer, reference, h),
                row,
                *parts,
                reference.logits,
                _sinks(layer, reference, h),
            )
            # Survivors stand in the order of slots.
            place_K = free_S[kept_1HS[0, h]].nonzero().flatten()
            own = (key_1HKD[0, h, place_K], value_1HKE[0, h, place_K])
            made = _fit(layer, seen, own, reference.query_bNQD.shape[2])
            key_1HKD[0, h, place_K], value_1HKE[0, h, place_K] = made
        return {KEY: key_1HKD, VALUE: value_1HKE}


def _queries(layer: Layer, reference: Tokens, head: int) -> Tensor:
    """The queries of all query heads of a KV head, those of one query head in turn: `[M, D]`."""
    group = reference.query_bNQD.shape[1] // layer.kind.heads
    return reference.query_bNQD[0, head * group : (head + 1) * group].flatten(0, 1)


def _sinks(layer: Layer, reference: Tokens, head: int) -> Tensor | None:
    """The learned logit of each of these, where there are any."""
    if reference.sink_N is None:
        return None
    sink_G = reference.sink_N.view(layer.kind.heads, -1)[head]
    return sink_G.repeat_interleave(reference.query_bNQD.shape[2])


def _fit(layer: Layer, seen: Seen, own: _Row, tokens: int) -> _Row:
    """The best of a row's slots as they are, with fitted values, and with biases too.

    Which one is best is decided by the queries that were held out. tokens: that queries are of.
    """
    rule = layer.recipe.fit
    assert rule is not None, "only recipes that fit come here"
    token_M = torch.arange(len(seen.rest_M), device=seen.rest_M.device) % tokens
    every = rule.held_out
    out_M = token_M % every == every // 2 if every else torch.zeros_like(token_M, dtype=torch.bool)
    given, tested = seen.of(~out_M), seen.of(out_M)
    made = _candidates(rule, given.alone() if rule.part else given, own)
    errors = {name: tested.error(times, row[1].float()) for name, (times, row) in made.items()}
    best = min(errors, key=errors.__getitem__) if every else list(made)[-1]
    layer.context.fitted[best] += 1
    return made[best][1]


def _candidates(rule: Refit, seen: Seen, own: _Row) -> dict[str, tuple[Tensor, _Row]]:
    """What may become of a row, as it is stored, and how many times as much its slots then weigh.

    Values are fitted to biases as they are stored, so that they make up for the rounding.
    """
    key_KD, value_KE = own
    once_K = seen.weight_MK.new_ones(len(value_KE))
    made = {"as they were": (once_K, own)}
    if rule.values:
        fitted_KE = fit_values(seen, once_K, value_KE.float(), rule.ridge)
        made["values"] = (once_K, (key_KD, fitted_KE.to(value_KE.dtype)))
    if rule.bias is not None:
        before_K, key_KD = key_KD[:, -1].float(), key_KD.clone()
        key_KD[:, -1] = before_K + fit_weights(seen, rule.bias, rule.ridge).log()
        times_K = (key_KD[:, -1].float() - before_K).exp()
        fitted_KE = value_KE.float()
        if rule.values:
            fitted_KE = fit_values(seen, times_K, fitted_KE, rule.ridge)
        name = "biases and values" if rule.values else "biases"
        made[name] = (times_K, (key_KD, fitted_KE.to(value_KE.dtype)))
    return made
