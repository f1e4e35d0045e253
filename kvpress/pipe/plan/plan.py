"""A plan: what was chosen, within which bytes, and what else was tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvpress.formulas.sizes import readable
from kvpress.pipe.plan.demand import Texts
from kvpress.pipe.plan.held import Bytes


class Memory(NamedTuple):
    """What a plan may use, in bytes.

    given: of the device, for everything. base: of it, what is there before the first cache: weights
    and, on a CPU, the process. host, disk: of the lower tiers.
    """

    given: int
    base: int
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Fit:
    """One policy, and whether it fits.

    kind: full, packed, evicting, retrieving, or given. chunk: tokens of a prompt that are read at
    once. head: bytes of a retrieval head and its keys. passing: bytes that reading takes besides;
    device: what pages may take on the device, in tiers. needed: of the device in all. refused: why
    the policy is none for this model.
    """

    kind: str
    policy: str
    tiered: bool
    needed: int = 0
    chunk: int = 0
    bytes: Bytes = field(default_factory=Bytes)
    head: int = 0
    passing: int = 0
    device: int | None = None
    fits: bool = False
    refused: str = ""

    def __str__(self) -> str:
        where = " in tiers" if self.tiered else ""
        if self.refused:
            return f"{self.policy}{where}: {self.refused}"
        return f"{self.policy}{where} needs {readable(self.needed)}"


@dataclass(frozen=True)
class Plan:
    """What an engine was planned with: its policy, its tiers, and what it reads at once.

    tried: what would do less harm, and why it is not taken.
    """

    model: str
    memory: Memory
    texts: Texts
    chosen: Fit
    tried: Sequence[Fit] = ()

    @property
    def policy(self) -> str:
        """The specification of the policy."""
        return self.chosen.policy

    @property
    def chunk(self) -> int | None:
        """Tokens of each prompt that are read at once; None: all of them."""
        return self.chosen.chunk if self.chosen.chunk < self.texts.prompt else None

    def __str__(self) -> str:
        return " ".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        chosen, memory = self.chosen, self.memory
        where = " in tiers" if chosen.tiered else ""
        given = f"memory={readable(memory.given)}"
        yield f"Planned for {self.texts} in {given}: {chosen.policy}{where}."
        yield (
            f"It takes at most {readable(chosen.needed)}: {readable(memory.base)} were there"
            f" before, keys and values take {readable(chosen.bytes.held)}, and reading"
            f" {readable(chosen.passing)}."
        )
        if chosen.head:
            yield f"The retrieval head has {readable(chosen.head)} of its own."
        if chosen.tiered:
            yield f"Of keys and values {readable(chosen.device or 0)} may be on the device."
        if self.chunk:
            yield f"Prompts are read {self.chunk:,} tokens at a time."
        if self.tried:
            yield f"Not chosen: {'; '.join(map(str, self.tried))}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "model": self.model,
            "memory": self.memory._asdict(),
            "texts": self.texts._asdict(),
            "chosen": plain(self.chosen),
            "tried": [plain(fit) for fit in self.tried],
        }


def plain(fit: Fit) -> dict[str, Any]:
    """A fit in plain values."""
    return {**vars(fit), "bytes": fit.bytes._asdict()}
