"""The prompt phase of one layer: attend exactly, observe, score, select, and store what stays.

Each layer is compressed as soon as it has attended, so that the peak is the compressed cache plus
one full layer. A prompt chunk or chat turn on top of stored tokens takes the same path.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvpress.attend import prompt_attention
from kvpress.layer import Layer, Tokens
from kvpress.observe import prompt_sums
from kvpress.select import gather, kept_index
from kvpress.store import Survivors
from kvpress.store.base import KEY, MASS, POSITION, VALUE
from kvpress.types import EMPTY, Slots


def run_prompt(layer: Layer, tokens: Tokens, before_B: Tensor) -> Tensor:
    """Attention output `[B, N, P, D]` of a prompt chunk; zeros for padding. Stores what stays."""
    layer.decoded = 0
    batch, device = len(before_B), tokens.key_BHPD.device
    together = tokens.valid_BP is None and _uniform(layer, before_B)
    # Otherwise each sequence goes alone, on its real tokens: a row alone equals a row in a batch.
    groups = [list(range(batch))] if together else [[b] for b in range(batch)]
    outputs, survivors = [], []
    for group in groups:
        part = tokens if together else _alone(tokens, group[0])
        columns = _candidates(layer, group, part, before_B)
        with layer.run.meter.stage("prefill attention", device):
            outputs.append(_attend(layer, part, columns))
        with torch.no_grad():
            survivors.append(_compress(layer, group, part, columns))
    with torch.no_grad(), layer.run.meter.stage("store", device):
        _store(layer, tokens, survivors, before_B)
    return outputs[0] if together else _scatter(outputs, tokens)


def _uniform(layer: Layer, before_B: Tensor) -> bool:
    """Whether all sequences have seen and hold the same number of tokens."""
    counts_BH = layer.rows.counts_BH
    return bool((counts_BH == counts_BH[:1]).all() and (before_B == before_B[:1]).all())


def _alone(tokens: Tokens, b: int) -> Tokens:
    """The real tokens of one sequence."""
    states = [x[b : b + 1] for x in (tokens.query_BNPD, tokens.key_BHPD, tokens.value_BHPD)]
    if tokens.valid_BP is not None:
        real_P = tokens.valid_BP[b].nonzero().flatten().to(tokens.key_BHPD.device)
        states = [x.index_select(2, real_P) for x in states]
    query, key, value = states
    return Tokens(query, key, value, None, tokens.scaling, tokens.softcap)


def _candidates(
    layer: Layer, group: list[int], tokens: Tokens, before_B: Tensor
) -> dict[str, Tensor]:
    """What is stored of some sequences, in position order, followed by their new tokens: dense."""
    batch, heads, new = tokens.key_BHPD.shape[:3]
    device = tokens.key_BHPD.device
    position_BP = torch.arange(new) + before_B[group, None]
    position_BHP = position_BP.to(device)[:, None].expand(batch, heads, new)
    columns = {KEY: tokens.key_BHPD, VALUE: tokens.value_BHPD, POSITION: position_BHP}
    if layer.recipe.accumulates:
        columns[MASS] = torch.zeros(batch, heads, new, device=device)
    if not bool((layer.rows.counts_BH[group] > 0).any()):
        return columns
    old = layer.rows.dense_by_position(group)
    return {name: torch.cat([old[name].to(x.dtype), x], dim=2) for name, x in columns.items()}


def _attend(layer: Layer, tokens: Tokens, columns: dict[str, Tensor]) -> Tensor:
    fresh = columns[KEY] is tokens.key_BHPD
    return prompt_attention(
        tokens.query_BNPD,
        columns[KEY],
        columns[VALUE],
        None if fresh else columns[POSITION],
        tokens.scaling,
        tokens.softcap,
        layer.kind.window,
    )


def _compress(
    layer: Layer, group: list[int], tokens: Tokens, columns: dict[str, Tensor]
) -> Survivors:
    """The slots of some sequences that stay, after observation and selection."""
    meter, device = layer.run.meter, tokens.key_BHPD.device
    with meter.stage("observe", device):
        slots = _observe(layer, group, tokens, columns)
        if slots.mass_BHS is not None:
            columns[MASS] = slots.mass_BHS
    with meter.stage("select", device):
        stored_BHS = slots.position_BHS != EMPTY
        stored_BH = stored_BHS.sum(-1).cpu()
        if bool((stored_BH <= layer.quota_BH[group]).all()):
            kept_BHS, counts_BH = stored_BHS, stored_BH
        else:
            kept_BHS, counts_BH = layer.select(slots, group, stored_BH)
        if bool((counts_BH < stored_BHS.shape[-1]).any()):
            index_BHK = kept_index(kept_BHS, counts_BH)
            columns = {name: gather(x, index_BHK) for name, x in columns.items()}
        return Survivors(tuple(group), columns, counts_BH, bool((counts_BH < stored_BH).any()))


def _observe(layer: Layer, group: list[int], tokens: Tokens, columns: dict[str, Tensor]) -> Slots:
    """The slots of some sequences with what the policy asked to observe and to accumulate."""
    slots = Slots(
        layer=layer.kind.index,
        position_BHS=columns[POSITION],
        seen_B=layer.seen_B[group].to(tokens.key_BHPD.device),
        new_tokens=tokens.query_BNPD.shape[2],
        fetch=columns.__getitem__,
        mass_BHS=columns.get(MASS),
    )
    if slots.new_tokens == 0:
        return slots
    request = layer.recipe.stage("observe").observe(layer.step())
    if request is not None:
        sums_BHS = prompt_sums(
            tokens.query_BNPD,
            columns[KEY],
            columns[POSITION],
            layer.kind.index,
            request,
            tokens.scaling,
            tokens.softcap,
        )
        slots = replace(slots, attention_BHS=sums_BHS)
    if layer.recipe.accumulates:
        mass_BHS = layer.recipe.stage("accumulate").accumulate(slots).float()
        slots = replace(slots, mass_BHS=mass_BHS)
    return slots


def _store(layer: Layer, tokens: Tokens, survivors: list[Survivors], before_B: Tensor) -> None:
    """Appends the prompt where nothing else changed; otherwise refills the rows."""
    evicted = any(group.evicted for group in survivors)
    if evicted:
        layer.evicted_at = layer.columns_seen
    if evicted or layer.recipe.accumulates or not bool(layer.rows.counts.any()):
        layer.refill(survivors)
    else:
        layer.append(tokens, before_B)


def _scatter(outputs: list[Tensor], tokens: Tokens) -> Tensor:
    """The outputs of sequences that went alone, back at the columns of their tokens."""
    shape = (len(outputs), *tokens.query_BNPD.shape[1:3], outputs[0].shape[-1])
    out_BNPD = outputs[0].new_zeros(shape)
    for b, out in enumerate(outputs):
        if tokens.valid_BP is None:
            out_BNPD[b] = out[0]
        else:
            out_BNPD[b, :, tokens.valid_BP[b].to(out.device)] = out[0]
    return out_BNPD
