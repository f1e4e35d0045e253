"""Which of the stored pages a decode step reads, and what it may have missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kvpress.formulas import sinks
from kvpress.ops import Logits
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.retrieval import Retrieval
from kvpress.store.ahead import Likely, bring_ahead
from kvpress.store.chosen import Memo, Wanted

# Shares of a head's attention, how many are enough, and what was chosen by them.
Foreseen: TypeAlias = tuple[Tensor | None, float, Memo | None]
_NO_LOGITS = Logits(1.0)  # of a step whose queries are not known yet


def attend(
    layer: Layer, group: Sequence[int] | None, tokens: Tokens, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Attention output of one new token of some sequences, and weights: 0 where nothing was read.

    group: the sequences, None for all of them. What sinks take is no part of how pages are chosen:
    what a step is certified to miss at most is then less than it was asked for, and is reported so.
    """
    rule, rows = layer.stores.retrieval, layer.rows.retrieving
    assert rule is not None and rows is not None, "only such rows are asked"
    counts = layer.rows.counts if group is None else layer.rows.counts_BH[list(group)].flatten()
    held: list[int] = counts.tolist()
    out, weights, found = rows.attend_some(_wanted(layer, rule, group, tokens, need_weights, held))
    if tokens.sink_N is not None:
        out, weights = sinks.taken((out, found.lse_bN[..., None], weights), tokens.sink_N)
        lse_bN = sinks.with_sinks(found.lse_bN, tokens.sink_N)
        found = found._replace(out_bN1E=out, lse_bN=lse_bN)
    layer.reads.add(found, sum(held), group)
    if rule.turn is not None:
        _remember(layer, group, tokens.query_bNQD[:, :, 0])
    if rule.guess == "step" and group is None:
        guess(layer, tokens.query_bNQD)
    return out, weights


def foresee(layers: Sequence[Layer]) -> None:
    """Begins to load what the next step will read, where a head says so before the first layer."""
    likely = [own for layer in layers for own in _likely(layer, None)]
    if likely:
        bring_ahead(likely)


def guess(layer: Layer, query_BN1D: Tensor) -> None:
    """Begins to load what a step of a layer would choose that had these queries."""
    if len(query_BN1D) == len(layer.sequences) and layer.in_step:
        likely = _likely(layer, query_BN1D)
        if likely:
            bring_ahead(likely)


def loads(layer: Layer) -> bool:
    """Whether the next step of a layer may have to load what it chooses."""
    tiers, drafts = layer.context.tiers, layer.context.recording.on
    if tiers is None or tiers.vault is None or drafts:  # drafted tokens attend to everything
        return False
    return layer.stores.retrieval is not None and layer.store is not None and layer.store.streams


def _likely(layer: Layer, query_BN1D: Tensor | None) -> list[Likely]:
    """What a layer will most likely read that may have to be loaded: by queries, or by a head."""
    rule = layer.stores.retrieval
    if rule is None or not loads(layer):
        return []
    rows, foreseen = layer.rows, _foreseen(layer, rule, None)
    by = foreseen[0] if query_BN1D is None else query_BN1D
    if by is None or rows.retrieving is None:
        return []
    with rows.memory.lock:
        seen_B = layer.sequences.seen_B.to(rows.device) + 1  # the token to come is one of them
        slots = [rule.slots(count + 1) - 1 for count in rows.counts.tolist()]
        always, judges = (rule.sink, rule.recent), (rule.cells, rule.candidates)
        wanted = Wanted(by, None, _NO_LOGITS, False, slots, seen_B, *always, *judges)
        return rows.retrieving.foresee(wanted.by_head(*foreseen))


def _wanted(
    layer: Layer,
    rule: Retrieval,
    group: Sequence[int] | None,
    tokens: Tokens,
    need_weights: bool,
    held: Sequence[int],
) -> Wanted:
    """What the rule comes to for the rows of some sequences, which hold so many tokens."""
    rows, own, earlier_bND = layer.rows, layer.sequences, None
    seen_b = (own.seen_B if group is None else own.seen_B[list(group)]).to(rows.device)
    if rule.turn is not None:
        earlier_bND = _earlier(layer, group, tokens.query_bNQD[:, :, 0], rule.turn)
    return Wanted(
        tokens.query_bNQD,
        group,
        tokens.logits,
        need_weights,
        [rule.slots(count) for count in held],
        seen_b,
        rule.sink,
        rule.recent,
        rule.cells,
        rule.candidates,
        rule.mass,
        rule.top,
        rule.tree,
        earlier_bND,
        *_foreseen(layer, rule, group),
    )


def _foreseen(layer: Layer, rule: Retrieval, group: Sequence[int] | None) -> Foreseen:
    """What a head looked at before this step, where it is asked and did: see `Wanted`."""
    outlook = layer.context.outlook
    if rule.head is None or outlook is None or outlook.share_BHS is None:
        return None, 0.0, None
    share_BHS = outlook.share_BHS
    if share_BHS.shape[1] != layer.kind.heads:  # a head from a file knows those of all processes
        share_BHS = layer.kind.own(share_BHS, 1)
    if group is None:
        return share_BHS.to(layer.rows.device), rule.sure, outlook.memo
    return share_BHS[list(group)].to(layer.rows.device), rule.sure, None


def _earlier(layer: Layer, group: Sequence[int] | None, query_bND: Tensor, turn: float) -> Tensor:
    """The queries of the step before; those of now for rows whose queries have turned since."""
    own, rows = layer.sequences, layer.rows
    mine = [own.earlier.get(b) for b in (range(len(own)) if group is None else group)]
    known = [query_bND[i] if x is None else x for i, x in enumerate(mine)]
    earlier_bND = torch.stack(known).to(query_bND.dtype)
    cosine_bN = torch.cosine_similarity(query_bND.float(), earlier_bND.float(), dim=-1)
    mean_bH = cosine_bN.view(len(query_bND), rows.heads, -1).mean(-1)
    mean_bH[[i for i, x in enumerate(mine) if x is None]] = -torch.inf  # the first step of a text
    turned_bN = (mean_bH < turn).repeat_interleave(query_bND.shape[1] // rows.heads, 1)
    layer.reads.turned += int(turned_bN.sum()) // (query_bND.shape[1] // rows.heads)
    return torch.where(turned_bN[..., None], query_bND, earlier_bND)


def _remember(layer: Layer, group: Sequence[int] | None, query_bND: Tensor) -> None:
    everybody = range(len(layer.sequences)) if group is None else group
    for b, query_ND in zip(everybody, query_bND, strict=True):
        layer.sequences.earlier[b] = query_ND.detach().clone()
