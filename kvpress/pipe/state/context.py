"""What the layers of one cache share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvpress.errors import CacheError
from kvpress.formulas.norms import Norms
from kvpress.formulas.rotation import Rotation
from kvpress.host import lasting
from kvpress.parallel import ALONE, Ranks
from kvpress.pipe.state.drafting import Recording
from kvpress.pipe.state.growth import Growth
from kvpress.pipe.state.heap import Heap
from kvpress.pipe.state.meter import Meter
from kvpress.pipe.state.outlook import Outlook
from kvpress.pipe.state.spans import Ranges
from kvpress.policy.base import Policy
from kvpress.policy.pooling import Calibrated
from kvpress.policy.probes import Probe
from kvpress.policy.recipe import Recipe
from kvpress.policy.sparsity import Thresholds
from kvpress.store.tiers.tiers import Tiers
from kvpress.types import LayerKind


@dataclass
class Ledger:
    """What is written down of a cache: seconds, lines for the report, the most bytes held."""

    meter: Meter = field(default_factory=Meter)
    notes: dict[str, None] = field(default_factory=dict)  # an ordered set of lines
    bytes_peak: int = 0  # the most that was held so far; see `Report`
    noted_at: int = -1  # logical length at which a layer last gave something back
    prompt_seconds: float = 0.0  # from the first layer to the last, of all prompts
    prompt_begun: float = 0.0

    def note(self, line: str) -> None:
        """Adds a line to the report, once."""
        self.notes[line] = None

    def withdraw(self, start: str) -> None:
        """Takes back the lines that start so, of a chunk or turn before."""
        for line in [line for line in self.notes if line.startswith(start)]:
            del self.notes[line]


@dataclass
class Context:
    """What the layers of one cache share."""

    recipe: Recipe
    compressed: int  # layers that have the policy's budget
    page_slots: int
    horizon: int  # tokens that the caller expects to decode
    ledger: Ledger
    cache_dtype: torch.dtype | None = None  # of stored keys and values; None: the model's
    rotations: tuple[Rotation | None, ...] = ()  # of the keys of every layer, where needed
    thresholds: Thresholds | None = None  # of blocks of prompt attention, where it is sparse
    layers: list[Any] = field(default_factory=list)  # those that share this
    recording: Recording = field(default_factory=Recording)
    newest: tuple[Tensor, Tensor] | None = None  # tokens seen before the last step, and after it
    growth: Growth | None = None  # of the quotas of all layers, while tokens are decoded
    plans: dict[Hashable, list[Any]] = field(default_factory=dict)  # slots of rows, by prompt
    calibrated: Mapping[Calibrated, Mapping[str, Tensor]] = field(default_factory=dict)
    tiers: Tiers | None = None  # where old pages of all caches of the engine are
    outlook: Outlook | None = None  # what a head says before the first layer; None: there is none
    heap: Heap | None = None  # what grows there was promised to take so much; None: it was not
    protect: list[Ranges] = field(default_factory=list)  # of all sequences, or of each
    looks: dict[int, Probe] = field(default_factory=dict)  # that are read just now, by sequence
    fitting: bool = False  # to what is read just now
    fitted: Counter[str] = field(default_factory=Counter)  # rows by what is fitted of them
    norms: dict[int, Norms] = field(default_factory=dict)  # of layers that a probe passes
    held: set[int] = field(default_factory=set)  # whose prompts wait for all layers, or for a look
    pending: dict[int, list[tuple[list[int], Tensor, Tensor]]] = field(default_factory=dict)
    grams: tuple[Tensor, ...] = ()  # of the output projection of every layer, where needed
    ranks: Ranks = ALONE  # the processes that hold the model together
    dirty: int | None = None  # the layer in which a pass is under way, or failed

    def begin(self, notes: Mapping[str, None]) -> None:
        """Forgets every pass, and what was said about tokens to come. notes: what still holds."""
        self.ledger.notes.clear()
        self.ledger.notes.update(notes)
        self.ledger.bytes_peak, self.ledger.prompt_seconds = 0, 0.0
        self.recording = Recording()
        self.newest = self.dirty = self.growth = None
        self.protect, self.looks, self.held, self.fitting = [], {}, set(), False
        if self.outlook is not None:
            self.outlook.clear()

    def go_on_from(self, other: Context) -> None:
        """Takes over what was said about tokens of another cache, and what was noted of it."""
        self.ledger.notes.update(other.ledger.notes)
        self.horizon, self.protect = other.horizon, list(other.protect)
        self.recording.on = other.recording.on
        self.outlook = None if other.outlook is None else other.outlook.copy()

    def select(self, index: Sequence[int]) -> None:
        """Sequence i becomes what sequence `index[i]` was."""
        if self.outlook is not None:
            self.outlook.select(index)

    def protected(self, batch: int, kind: LayerKind) -> list[Ranges]:
        """The protected tokens of so many sequences; none where a layer keeps a window anyway.

        Raises CacheError if they do not fit.
        """
        given = len(self.protect)
        if not given or kind.window is not None:
            return []
        if batch % given:
            raise CacheError(
                f"protect= names tokens of {given} sequences, but the batch has {batch}. Give one"
                " list of ranges for all sequences, or one for each."
            )
        return [ranges for ranges in self.protect for _ in range(batch // given)]

    def forget(self) -> None:
        """Forgets what was made of the rows of all layers, of which some are gone."""
        self.growth = None
        self.pending.clear()

    def calibrated_for(self, policy: Policy) -> Mapping[str, Tensor]:
        """What a policy needs to know of the model; nothing where it needs nothing."""
        return self.calibrated.get(policy.calibrated, {}) if policy.calibrated else {}

    def calibrated_at(self, policy: Policy, kind: LayerKind) -> Mapping[str, Tensor]:
        """The same of one layer: files count the layers that have a budget."""
        whole = self.calibrated_for(policy)
        if not whole or kind.window is not None:
            return {}
        others = (layer.kind for layer in self.layers)
        place = sum(x.window is None and x.index < kind.index for x in others)
        return {name: _own(name, x[place], kind) for name, x in whole.items()}

    def one_more(self, seen_B: Tensor) -> Tensor:
        """`seen_B + 1`, one tensor for all layers, since they see the same tokens."""
        if self.newest is not None:
            before_B, after_B = self.newest
            if before_B is seen_B or torch.equal(before_B, seen_B):
                return after_B
        self.newest = (seen_B, _next(seen_B))
        return self.newest[1]

    def begin_prompt(self, layer: object) -> None:
        """To be called before each layer reads a prompt: the first one starts the clock."""
        if layer is self.layers[0]:
            self.ledger.prompt_begun = perf_counter()

    def end_prompt(self, layer: object) -> None:
        """To be called after each layer has read a prompt: the last one stops the clock."""
        if layer is self.layers[-1]:
            self.ledger.prompt_seconds += perf_counter() - self.ledger.prompt_begun

    def note_peak(self, more: int = 0) -> None:
        """Notes what all layers hold now, and `more` bytes, if that is the most so far."""
        held = sum(layer.bytes_held for layer in self.layers) + more
        self.ledger.bytes_peak = max(self.ledger.bytes_peak, held)

    def note_peak_at(self, columns: int, more: int = 0) -> None:
        """To be called before a layer that has seen so many columns gives memory back.

        All layers do so in the same pass: the first of them notes what all hold then, and `more`
        bytes. Between two such passes a cache only grows, so that other tokens cost nothing.
        """
        if self.ledger.noted_at != columns:
            self.ledger.noted_at = columns
            self.note_peak(more)


def _own(name: str, given: Tensor, kind: LayerKind) -> Tensor:
    """What belongs to the heads here; the letters of the name say which dimension counts heads."""
    letters = name.rpartition("_")[2].replace("L", "")
    place = max(letters.find("H"), letters.find("N"))
    return given if place < 0 else kind.own(given, place)


@lasting
def _next(seen_B: Tensor) -> Tensor:
    return seen_B + 1
