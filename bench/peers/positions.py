"""Which positions presses and policies keep of the same tokens: one row per pair and budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kvpress.bench.common import progress
from kvpress.bench.common.environment import environment
from kvpress.bench.common.journal import Journal, Row
from kvpress.bench.common.output import check_writable, say_if_nothing_was_measured
from kvpress.bench.common.prompt import parts
from kvpress.bench.common.text import default_text
from kvpress.bench.peers.agreement import Agreement, agreement
from kvpress.bench.peers.pairs import PAIRS, Frame, Pair, frame, recipe
from kvpress.bench.peers.remote import PREFIX, Peer
from kvpress.bench.peers.tokens_right import FULL, Scores, names_of, tokens_right
from kvpress.bench.quality.system import LocalSystem
from kvpress.bench.speed.setting import Setting

Names = tuple[str, str]  # a press and a policy, each with its budget


def run(
    setting: Setting,
    budgets: Sequence[str],
    tokens: int,
    texts: int,
    contexts: int,
    out: Path | None,
) -> tuple[list[Row], Scores]:
    """The rows of all pairs, and the scores of those that are known to differ, and of `full`.

    texts: how many prompts of so many tokens each pair reads. contexts: of each task, for the
    tokens that are right where the question came after compressing; 0: none. out: JSON lines that
    the run goes on from.
    """
    check_writable("--out", out)
    journal, facts = Journal(out), environment(torch.device(setting.device))
    model, tokenizer = setting.source.load()
    around = frame(tokenizer)
    counts = {"tokens": tokens, "texts": texts}
    wanted = [
        {**_identity(pair, budget, pair.at(budget, around), setting), **counts}
        for budget in budgets
        for pair in PAIRS
    ]
    prompts = prompts_of(model, tokenizer, around, tokens, texts)
    peer = Peer(PREFIX + wanted[0]["press"], setting)
    try:
        measure = partial(_measured, model, peer, around, prompts)
        with progress.bar() as shown:
            rows = [
                _row(journal, identity, facts, measure)
                for identity in shown.track(wanted, description="pairs")
            ]
        names = [FULL, *(name for row in rows if row["differs"] for name in names_of(row))]
        load = partial(tuple, (model, tokenizer))
        scores = tokens_right(setting, peer, around, contexts, tokens, facts, out, load, names)
    finally:
        peer.close()
    say_if_nothing_was_measured(out, journal.added)
    return rows, scores


def prompts_of(
    model: Any, tokenizer: Any, around: Frame, tokens: int, texts: int
) -> list[list[int]]:
    """Parts of the language reference, each as the beginning of a user's turn in a chat.

    Raises PromptError or PolicyError where the model's positions or the text do not suffice.
    """
    room, text = tokens - len(around.prefix), default_text().content
    found = parts(model, tokenizer, text, room, texts)
    return [[*around.prefix, *ids_1T[0].tolist()] for ids_1T in found]


def kept(system: LocalSystem, tokens: Sequence[int]) -> list[list[list[int]]]:
    """The positions that a policy holds of a prompt, by layer and KV head."""
    cache = system.read(tokens)
    return [
        [
            cache.kept_positions(layer=layer, sequence=0, head=head)
            for head in range(state.kind.heads)
        ]
        for layer, state in enumerate(cache.states)
    ]


def _identity(pair: Pair, budget: str, names: Names, setting: Setting) -> Row:
    press, policy = names
    return {
        "bench": "positions",
        "press": press,
        "policy": policy,
        "budget": budget,
        "differs": pair.differs,
        "settings": setting.to_dict(),
    }


def _row(
    journal: Journal,
    identity: Row,
    facts: Mapping[str, Any],
    measure: Callable[[str, str], Agreement],
) -> Row:
    """The row that the journal holds, or a new one."""
    known = journal.find(identity)
    if known is None:
        found = measure(identity["press"], identity["policy"]).to_dict()
        known = {**identity, **found, "environment": dict(facts)}
        journal.add(known)
    return known


def _measured(
    model: Any,
    peer: Peer,
    around: Frame,
    prompts: Sequence[Sequence[int]],
    press: str,
    policy: str,
) -> Agreement:
    peer.use(PREFIX + press)
    system = LocalSystem(model, recipe(policy, around.words))
    return agreement([kept(system, text) for text in prompts], [peer.kept(x) for x in prompts])
