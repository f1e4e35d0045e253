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
from kvpress.bench.common.text import default_text
from kvpress.bench.peers.agreement import Agreement, agreement
from kvpress.bench.peers.pairs import PAIRS, Frame, Pair, frame, recipe
from kvpress.bench.peers.remote import PREFIX, Peer
from kvpress.bench.peers.tokens_right import tokens_right
from kvpress.bench.quality.system import LocalSystem
from kvpress.bench.speed.setting import Setting

Names = tuple[str, str]  # a press and a policy, each with its budget
FULL = "full"


def run(
    setting: Setting,
    budgets: Sequence[str],
    tokens: int,
    texts: int,
    contexts: int,
    out: Path | None,
) -> list[Row]:
    """The rows of all pairs. texts: how many prompts of so many tokens each pair reads.

    contexts: of each task, for the tokens that are right where the question came after compressing;
    0: none. out: JSON lines that the run goes on from.
    """
    check_writable("--out", out)
    journal, facts = Journal(out), environment(torch.device(setting.device))
    model, tokenizer = setting.source.load()
    around = frame(tokenizer)
    counts = {"tokens": tokens, "texts": texts, "contexts": contexts}
    wanted = [
        {**_identity(pair, budget, pair.at(budget, around), setting), **counts}
        for budget in budgets
        for pair in PAIRS
    ]
    peer = Peer(f"{PREFIX}KnormPress", setting)
    try:
        names = [FULL, *(name for row in wanted for name in _names(row).values())]
        load = partial(tuple, (model, tokenizer))
        right = tokens_right(setting, peer, around, contexts, tokens, facts, out, load, names)
        prompts = prompts_of(tokenizer, around, tokens, texts)
        measure = partial(_measured, model, peer, around, prompts)
        with progress.bar() as shown:
            rows = []
            for identity in shown.track(wanted, description="pairs"):
                rows.append(_row(journal, identity, facts, right, measure))
    finally:
        peer.close()
    say_if_nothing_was_measured(out, journal.added)
    return rows


def prompts_of(tokenizer: Any, around: Frame, tokens: int, texts: int) -> list[list[int]]:
    """Parts of the language reference, each as the beginning of a user's turn in a chat."""
    ids = tokenizer(default_text().content, add_special_tokens=False)["input_ids"]
    room = tokens - len(around.prefix)
    return [[*around.prefix, *ids[i * room : (i + 1) * room]] for i in range(texts)]


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


def _names(row: Row) -> dict[str, str]:
    """Who answers questions for a row."""
    return {FULL: FULL, "theirs": PREFIX + row["press"], "ours": row["policy"]}


def _row(
    journal: Journal,
    identity: Row,
    facts: Mapping[str, Any],
    right: Mapping[str, list[Row]],
    measure: Callable[[str, str], Agreement],
) -> Row:
    """The row that the journal holds, or a new one."""
    known = journal.find(identity)
    if known is None:
        quality = {whose: right.get(name, []) for whose, name in _names(identity).items()}
        found = measure(identity["press"], identity["policy"]).to_dict()
        known = {**identity, **found, "quality": quality, "environment": dict(facts)}
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
