"""What presses and policies still know of a context: the tokens that are right in answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpress.bench.common.journal import Row
from kvpress.bench.peers.pairs import Frame, recipe
from kvpress.bench.peers.remote import PREFIX, Peer
from kvpress.bench.quality.sample import Question
from kvpress.bench.quality.system import Held, LocalSystem, System
from kvpress.bench.speed import benches, scores
from kvpress.bench.speed.setting import Setting
from torch import Tensor

TASKS = ("copy", "needle")
FULL = "full"
Scores = Mapping[str, Mapping[str, float | None]]  # right tokens by name and task


def names_of(row: Row) -> tuple[str, str]:
    """Who answers questions for a row: a press and a policy."""
    return PREFIX + row["press"], row["policy"]


def tokens_right(
    setting: Setting,
    peer: Peer,
    around: Frame,
    contexts: int,
    tokens: int,
    facts: dict[str, Any],
    out: Path | None,
    load: benches.Load,
    names: Sequence[str],
) -> Scores:
    """The scores of presses and policies by their names; none where no contexts are asked for.

    out: of the command; these results lie in a file beside it, from which a run goes on.
    """
    if not contexts:
        return {}
    found = scores.measure(
        scores.QualityOptions(TASKS, contexts),
        setting,
        Sharing(peer, around.words),
        load,
        list(dict.fromkeys(names)),
        [tokens],
        facts,
        None if out is None else out.with_suffix(".quality.jsonl"),
    )
    return {name: {row["task"]: row["score"] for row in rows} for (name, _), rows in found.items()}


class Sharing(benches.LocalCandidates):
    """Policies, with the peer's words where they ask for them, and presses of one process."""

    def __init__(self, peer: Peer, words: str) -> None:
        self._peer, self._words = peer, words

    def system(self, model: Any, name: str) -> System:
        """One that answers questions about contexts."""
        if name.startswith(PREFIX):
            return Sharer(self._peer, name)
        made = LocalSystem(model, recipe(name, self._words))
        made.name = name
        return made


class Sharer:
    """A press in a process that others use besides: it must be asked before another one reads."""

    def __init__(self, peer: Peer, name: str) -> None:
        self._peer, self.name = peer, name

    def read(
        self, tokens: Sequence[int], calls: Sequence[Any] = (), protect: Sequence[Any] = ()
    ) -> int:
        """As `Peer`."""
        self._peer.use(self.name)
        return self._peer.read(tokens)

    def ask(self, cache: int, question: Question, stepwise: bool = False) -> Tensor:
        """As `Peer`. Raises PeerError."""
        return self._peer.ask(cache, question, stepwise)

    def decode(self, cache: int, prompt: Sequence[int], most: int) -> list[int]:
        """As `Peer`. Raises PeerError."""
        return self._peer.decode(cache, prompt, most)

    def bytes(self, cache: int) -> Held:
        """As `Peer`."""
        return self._peer.bytes(cache)

    def step_reads(self, cache: int) -> None:
        """As `Peer`."""
