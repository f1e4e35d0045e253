"""The pipe of one layer: new tokens in, attention output out, rows at their quotas.

A forward pass may mean different things to the sequences of a batch: a prompt chunk to one, a
decode step to another, nothing but padding to a third. Each is treated as if it were alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress.errors import CacheError
from kvpress.host import lasting
from kvpress.pipe.decode import run_decode
from kvpress.pipe.drafts import commit, run_drafts
from kvpress.pipe.groups import groups_of, scatter, take
from kvpress.pipe.layer_budgets import foresee, trim
from kvpress.pipe.pools import compress
from kvpress.pipe.probe import run_probe
from kvpress.pipe.prompt import run_prompt, store_prompt
from kvpress.pipe.sharing import seen_by_readers
from kvpress.pipe.stages.allocate import compressed, set_quotas
from kvpress.pipe.stages.format import pack_due, watch
from kvpress.pipe.stages.observe import recall
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.tokens import Tokens


def run_layer(layer: Layer, tokens: Tokens, valid_BQ: Tensor | None) -> Tensor:
    """Attention output `[B, N, Q, D]` of new tokens, which are then stored and compressed.

    valid_BQ: host bool, False for padding, whose output is zero; None means that all tokens are
    real. One new token of a sequence that has seen others is a decode step, everything else is a
    prompt. Raises BudgetError before anything changes.
    """
    if torch.is_inference_mode_enabled() and not is_step(layer, tokens, valid_BQ):
        return _pass_outside(layer, tokens, valid_BQ)
    return _pass(layer, tokens, valid_BQ)


def is_step(layer: Layer, tokens: Tokens, valid_BQ: Tensor | None) -> bool:
    """Whether this is a decode step that makes next to nothing that lasts.

    Leaving inference mode costs such a step a tenth; the few places where it makes something do so
    themselves. Counts on another device, packing, merging and drafts make something in every step.
    """
    single = tokens.key_bHQD.shape[2] == 1 and valid_BQ is None
    drafts = layer.context.recording.on or layer.sequences.drafts.tokens
    if not single or drafts or layer.store is None or not layer.store.on_host:
        return False
    aging = layer.rows.aging
    packs = layer.recipe.formats or (aging is not None and aging.room <= 1)
    return layer.recipe.merging is None and not packs and layer.in_step


def _pass(layer: Layer, tokens: Tokens, valid_BQ: Tensor | None) -> Tensor:
    if layer.store is None:
        layer.start(tokens.key_bHQD, tokens.value_bHQD)
    if layer.context.looks:
        layer.seen = seen_by_readers(layer, tokens, valid_BQ)
        return _run_probes(layer, tokens, valid_BQ)
    new = tokens.key_bHQD.shape[2]
    drafted = _drafted(layer, new, valid_BQ)
    reads = new > 1 and not drafted
    if reads:
        layer.context.begin_prompt(layer)
    heap = layer.context.heap if layer.rows.on_host else None
    before = 0 if heap is None else _size(layer, reads)
    with layer.rows.memory.lock:
        if layer.sequences.drafts.tokens:
            commit(layer)
            pack_due(layer)
        layer.seen = seen_by_readers(layer, tokens, valid_BQ)
        if drafted:
            out = _with_drafts(layer, tokens, drafted)
        else:
            out = _run_groups(layer, tokens, valid_BQ)
        if layer.stores.packs and not layer.sequences.drafts.tokens and not layer.context.held:
            pack_due(layer, _read(layer, new, valid_BQ))
    if reads:
        layer.context.end_prompt(layer)
    if heap is not None:
        after = _size(layer, reads)
        if reads or after > before:  # a pool grew; other steps leave next to nothing behind
            heap.stored(max(before, after) + tokens.key_bHQD.nbytes + tokens.value_bHQD.nbytes)
    layer.context.dirty = None
    return out


_pass_outside = lasting(_pass)


def _drafted(layer: Layer, new: int, valid_BQ: Tensor | None) -> int:
    """How many of the new tokens may be taken back. Raises CacheError where they cannot be."""
    recording = layer.context.recording
    drafted = recording.drafted(new, first=layer.columns_seen == 0) if recording.on else 0
    if drafted and valid_BQ is not None:
        raise CacheError(
            "Speculative decoding (activate_past_recording) of a batch with padding among the"
            " new tokens is not supported. Draft as many tokens for every sequence."
        )
    if drafted and (layer.recipe.shares or layer.recipe.defers) and drafted < new:
        raise CacheError(
            f"{layer.recipe} divides its budget among the layers once a prompt has passed all of"
            " them, and this pass holds a prompt and drafted tokens. Read the prompt in a pass of"
            " its own before speculative decoding starts, or use a policy with equal budgets."
        )
    return drafted


def _size(layer: Layer, reads: bool) -> int:
    """Bytes of the storages of a layer; where a prompt attends to copies of slots, of these."""
    rows = layer.rows
    if not reads:
        return rows.memory.nbytes
    slot = sum(column.page_bytes(1) for column in rows.columns.values())
    return max(rows.memory.nbytes, int(rows.counts.sum()) * slot)


def _read(layer: Layer, columns: int, valid_BQ: Tensor | None) -> dict[int, int]:
    """How many tokens of a prompt each sequence has read, where these are more than one."""
    if columns == 1:
        return {}
    whole = [columns] * len(layer.sequences)
    new_b = enumerate(whole if valid_BQ is None else valid_BQ.sum(1).tolist())
    return {b: new for b, new in new_b if new > 1}


def _with_drafts(layer: Layer, tokens: Tokens, drafted: int) -> Tensor:
    """The output of tokens of which the last ones may be taken back."""
    new = tokens.key_bHQD.shape[2]
    certain, drafts = tokens.part(0, new - drafted), tokens.part(new - drafted, new)
    outputs = [_run_groups(layer, certain, None)] if new > drafted else []
    return torch.cat([*outputs, run_drafts(layer, drafts)], dim=2)


def _run_groups(layer: Layer, tokens: Tokens, valid_BQ: Tensor | None) -> Tensor:
    columns = tokens.key_bHQD.shape[2]
    if columns == 1 and valid_BQ is None and layer.in_step:
        layer.advance_one()
        if layer.recipe.watched:
            watch(layer, range(len(layer.sequences)), tokens)
        if layer.recalled:
            recall(layer, range(len(layer.sequences)), tokens.query_bNQD)
        return run_decode(layer, None, tokens)
    before_B = layer.sequences.seen_B
    new_B = torch.full_like(before_B, columns) if valid_BQ is None else valid_BQ.sum(1)
    groups = groups_of(layer, new_B, columns, padded=valid_BQ is not None)
    prompts = [b for group in groups if not group.decodes for b in group.sequences]
    if layer.recipe.shares:
        foresee(layer, prompts, (before_B + new_B)[prompts])
    set_quotas(layer, prompts, (before_B + new_B)[prompts])
    layer.advance(columns, before_B + new_B, padded=valid_BQ is not None)

    outputs, survivors, chunks = [], [], []
    for group in groups:
        part = take(tokens, group.sequences, valid_BQ)
        watch(layer, group.sequences, part)
        if layer.recalled:
            layer.logits = (tokens.scaling, tokens.softcap)
            recall(layer, group.sequences, part.query_bNQD)
        if group.decodes:
            outputs.append(run_decode(layer, group.sequences, part))
            continue
        before_b = before_B[group.sequences]
        out, kept = run_prompt(layer, group.sequences, part, before_b)
        outputs.append(out)
        survivors.append(kept)
        chunks.append((part, before_b))
    store_prompt(layer, survivors, chunks)
    if layer.recipe.shares:
        trim(layer, prompts)
    if layer.recipe.defers and prompts:
        _hold(layer, prompts)
    return scatter(tokens, groups, outputs, valid_BQ)


def _hold(layer: Layer, prompts: list[int]) -> None:
    """Keeps prompts whole until all layers have them, or something was read behind them."""
    layer.context.held |= set(prompts)
    if not layer.recipe.looks and layer is compressed(layer)[-1]:
        compress(layer, prompts)


def _run_probes(layer: Layer, tokens: Tokens, valid_BQ: Tensor | None) -> Tensor:
    """The output of tokens that look at a text a second time; see probe.py."""
    new_B = torch.full_like(layer.sequences.seen_B, tokens.key_bHQD.shape[2])
    if valid_BQ is not None:
        new_B = valid_BQ.sum(1)
    groups = groups_of(layer, new_B, tokens.key_bHQD.shape[2], padded=valid_BQ is not None)
    with layer.rows.memory.lock:
        parts = [(x.sequences, take(tokens, x.sequences, valid_BQ)) for x in groups]
        outputs = [run_probe(layer, *part) for part in parts]
    return scatter(tokens, groups, outputs, valid_BQ)
