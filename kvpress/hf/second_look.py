"""The second look at a prompt: the model reads the policy's probes behind it, and forgets them."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kvpress import host
from kvpress.errors import CacheError, PolicyError
from kvpress.hf.cache import EngineCache
from kvpress.hf.norms import noted
from kvpress.host import lasting
from kvpress.pipe.pools import compress, end, finish, over, settle
from kvpress.pipe.probe import start_look
from kvpress.pipe.state.sequences import Sequences
from kvpress.policy.probes import Probe, Text

_FITTED = "Rows that were fitted to what all slots gave:"
LEAST_ROOM = 64  # positions behind a prompt, at least, that probes need
_LOG = logging.getLogger("kvpress")


def check_room(model: Any, cache: EngineCache, given: dict[str, Any]) -> None:
    """Raises CacheError, before anything changes, for a prompt that cannot be looked at again."""
    tokens, seen = given.get("input_ids"), cache.columns_seen
    if tokens is None:
        raise CacheError(
            f"{cache.spec.recipe} reads every prompt a second time and needs its token ids:"
            " inputs_embeds alone cannot be repeated. Pass input_ids."
        )
    after, limit = seen + tokens.shape[1], positions(model)
    if limit is not None and after + LEAST_ROOM > limit and (tokens.shape[1] > 1 or not seen):
        raise CacheError(
            f"{cache.spec.recipe} reads every prompt a second time behind its end, but after"
            f" {after} tokens fewer than {LEAST_ROOM} of the {limit} positions of the model are"
            " left. Give a shorter prompt, or use a policy with one pass."
        )


def positions(model: Any) -> int | None:
    """How many positions a model has; None: nothing is said."""
    config = model.config.get_text_config(decoder=True)
    known = getattr(config, "max_position_embeddings", None)
    return int(known) if isinstance(known, int) and known > 0 else None


@lasting
@torch.no_grad()
def look_again(model: Any, cache: EngineCache, name: str) -> None:
    """Reads the probes of every sequence whose prompt waits, then compresses all layers.

    model: the decoder without its head. name: by which it takes its cache. Raises CacheError if
    ids are not known.
    """
    states = cache.states
    first = next(state for state in states if state.kind.window is None)
    before = cache.beside.kept()
    seen_B = first.sequences.seen_B
    new = sorted(cache.context.held)  # not those that only decoded beside them
    probes = {b: _probes(model, cache, first.sequences, b) for b in new}
    if cache.spec.recipe.probes:
        for state in states:
            start_look(state, new)
    rounds = max((len(own) for own in probes.values()), default=0)
    try:
        with noted(model, cache.context, cache.spec.recipe):
            for i in range(rounds):
                _LOG.info("Second look at %d tokens: %d of %d", int(seen_B.max()), i + 1, rounds)
                _read(model, cache, name, {b: own[i] for b, own in probes.items() if i < len(own)})
                cache.beside.copy_from(before)
        if cache.spec.recipe.fit is None:
            compress(first, new)
        else:
            _fit(model, cache, name, new)
            cache.beside.copy_from(before)
    except BaseException:  # half a look is none: the cache says so from now on
        cache.context.dirty = first.kind.index
        raise
    finally:
        cache.context.looks, cache.context.fitting = {}, False
    for state in states:
        own = state.sequences
        own.looked_B = own.looked_B.clone()
        own.looked_B[new] = own.seen_B[new]


def _fit(model: Any, cache: EngineCache, name: str, new: Sequence[int]) -> None:
    """Reads what slots are fitted to; in every layer what stays is selected and fitted first."""
    first = next(state for state in cache.states if state.kind.window is None)
    context = cache.context
    settle(first, new)
    if not over(first, new):
        finish(first, new)
        return
    references = {b: _reference(model, cache, first.sequences, b) for b in new}
    context.fitting, context.fitted = True, Counter()
    _read(model, cache, name, references)
    end(first)
    context.ledger.withdraw(_FITTED)
    rows = ", ".join(f"{n} {what}" for what, n in sorted(context.fitted.items()))
    context.ledger.note(f"{_FITTED} {rows or 'none'}.")


def _probes(model: Any, cache: EngineCache, own: Sequences, b: int) -> Sequence[Probe]:
    """What the policy wants to be read behind a sequence. Raises PolicyError if it cannot be."""
    text = _text(model, cache, own, b)
    probes = cache.spec.recipe.stage("probes").probes(text)
    for probe in probes:
        _check(cache, probe, text)
    return probes


def _reference(model: Any, cache: EngineCache, own: Sequences, b: int) -> Probe:
    """What the slots of a sequence are fitted to. Raises PolicyError if it cannot be read."""
    text = _text(model, cache, own, b)
    rule = cache.spec.recipe.fit
    assert rule is not None, "only recipes that fit read a reference"
    probe = Probe(rule.reference(text.ids, text.room), 0, len(text.ids))
    _check(cache, probe, text)
    return probe


def _text(model: Any, cache: EngineCache, own: Sequences, b: int) -> Text:
    """A sequence as policies are shown it. Raises CacheError if its ids are not known."""
    seen, looked, sinks = (int(x[b]) for x in (own.seen_B, own.looked_B, own.sink_B))
    ids_T = cache.ids.all()[b]
    ids = ids_T[cache.ids.real()[b]].tolist()
    if len(ids) != seen or min(ids, default=0) < 0:
        raise CacheError(
            f"{cache.spec.recipe} reads every prompt a second time, but the ids of sequence {b} are"
            " not known. Pass input_ids to the model, not embeddings."
        )
    limit, said = positions(model), cache.spec.wording
    room = 2**31 if limit is None else limit - seen
    return Text(ids, min(max(looked, sinks), seen), said.texts, room, partial(said.words, ids))


def _check(cache: EngineCache, probe: Probe, text: Text) -> None:
    seen = len(text.ids)
    if not 0 <= probe.first < probe.last <= seen or not 0 < len(probe.ids) <= text.room:
        raise PolicyError(
            f"{cache.spec.recipe} wants to read {len(probe.ids)} tokens about tokens {probe.first}"
            f" to {probe.last} of {seen}, with {text.room} positions left; that is not possible."
        )


def _read(model: Any, cache: EngineCache, name: str, probes: dict[int, Probe]) -> None:
    """One forward pass over a probe of some sequences, padded on the left."""
    state = cache.states[0]
    batch, width = len(state.sequences), max(len(probe.ids) for probe in probes.values())
    ids_BQ, real_BQ = host.zeros(batch, width), host.zeros(batch, width, dtype=torch.bool)
    for b, probe in probes.items():
        ids_BQ[b, width - len(probe.ids) :] = host.tensor(probe.ids)
        real_BQ[b, width - len(probe.ids) :] = True
    cache.context.looks = dict(probes)
    place_BQ = (real_BQ.cumsum(1) - 1).clamp_min(0) + state.sequences.seen_B[:, None]
    device = cache.ids.all().device
    given: dict[str, Any] = {"input_ids": ids_BQ.to(device), name: cache, "use_cache": True}
    before_BT = cache.ids.real()
    if not bool(real_BQ.all()) or not bool(before_BT.all()):
        given["attention_mask"] = torch.cat([before_BT, real_BQ.to(device)], dim=1).long()
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = place_BQ.to(device)
    model(**given)


def waits(cache: EngineCache, columns: int | None) -> bool:
    """Whether a prompt is whole now and waits for its second look.

    columns: of the prompt of the call that it belongs to; None: every pass is a whole prompt.
    """
    held = bool(cache.context.held) and not cache.context.looks
    return held and (columns is None or cache.columns_seen >= columns)
