"""Random sequences of operations on rows in tiers, beside the same rows without any.

Every step is done three times: without tiers, with everything on the device, and with a device
that holds little more than the open spans. Bits are equal, and attention of the last two is too.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from packing import layout_of
from tiers import LateCopies, memory_folder

from kvpress.errors import TierError
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import Logits
from kvpress.store import Column, FormattedRows, PagedRows, Survivors, tiered_rows
from kvpress.store.spans import SPAN, span_pages
from kvpress.store.tiers.caps import Caps
from kvpress.store.tiers.data_file import DataFile, Source
from kvpress.store.tiers.directory import NOWHERE
from kvpress.store.tiers.folder import DiskSpec
from kvpress.store.tiers.syscalls import Syscalls
from kvpress.store.tiers.tiers import Tiers

WIDTHS, HEADS = (8, 6), 2
CPU = torch.device("cpu")
RAW = [layout_of(16, 16, WIDTHS, WIDTHS, torch.float32, slots, (32, 32)) for slots in (32, 64)]
FEW = [layout_of(8, 8, WIDTHS, WIDTHS, torch.float32, slots, (64, 32)) for slots in (64, 64)]
PLAIN = {
    "key": Column((WIDTHS[0],), torch.float32, slot_last=True),
    "value": Column((WIDTHS[1],), torch.float32),
}
MASSIVE = PLAIN | {"mass": Column((), torch.float32, volatile=True)}
MOST_ROWS, MOST_SEQUENCES = 2, 2
MIB = 1 << 20

Store = FormattedRows


class Trio:
    """Rows without tiers, with a wide device and with a tight one. tail: tokens to crop."""

    def __init__(self, stores: list[Store], tail: int = 0) -> None:
        self.stores, self.tail = stores, tail

    @property
    def plain(self) -> Store:
        return self.stores[0]

    def all(self, step: Callable[[Store], Any]) -> list[Any]:
        return [step(store) for store in self.stores]


def least_device(layouts: list[PageLayout], open_spans: int) -> int:
    """Bytes of a device that has room for what is on its way, and so many spans of all heads."""
    recent = PagedRows(1, HEADS, PLAIN, 16, CPU)
    rows = tiered_rows(recent, layouts, 0, False, Tiers(Caps(1), "none"), 0)
    channels = [torch.arange(width).expand(1, HEADS, width) for width in WIDTHS]
    with pytest.raises(TierError, match="device=1 bytes are too few") as raised:
        rows.aging.decide([0], layouts, *channels, torch.zeros(1, HEADS).long())
    three_units = int(re.findall(r"at least device=(\d+)", str(raised.value))[0])
    span = HEADS * max(span_pages(x) * x.page_bytes for x in layouts)
    return three_units * 2 // 3 + open_spans * span


class Tiered(RuleBasedStateMachine):
    """Appends, evictions, crops, beams, forks and files."""

    def __init__(self) -> None:
        super().__init__()
        self.trios: list[Trio] = []
        self.tiers: list[Tiers] = []
        self.folder = memory_folder(Path(tempfile.gettempdir()))
        self.path = self.folder.__enter__()

    @initialize(
        sequences=st.integers(1, MOST_SEQUENCES),
        layouts=st.sampled_from([RAW, FEW]),
        residual=st.sampled_from([0, 5, 40]),
        kept=st.sampled_from(["ordered", "positions", "masses"]),
        lower=st.sampled_from(["host", "disk", "both"]),
        late=st.booleans(),
    )
    def start(
        self,
        sequences: int,
        layouts: list[PageLayout],
        residual: int,
        kept: str,
        lower: str,
        late: bool,
    ) -> None:
        torch.manual_seed(0)
        self.layouts, self.residual, self.ordered = layouts, residual, kept == "ordered"
        self.columns, self.seen = MASSIVE if kept == "masses" else PLAIN, 0
        host = {"host": 4 * MIB, "disk": 0, "both": MIB // 4}[lower]
        disk = None if lower == "host" else DiskSpec(8 * MIB, self.path)
        # An open span of every sequence, one that comes, and one for what alignment costs.
        least = least_device(layouts, MOST_ROWS * MOST_SEQUENCES + 2)
        engine = LateCopies() if late else None
        self.tiers = [
            Tiers(Caps(4 * MIB), "wide"),
            Tiers(Caps(least, host, disk), "t", engine=engine),
        ]
        self.trios = [Trio(self.new(sequences))]
        self.feed(self.trios[0], 450, True)

    def new(self, sequences: int) -> list[Store]:
        made_of = (self.layouts, self.residual, self.ordered)
        recent = [PagedRows(sequences, HEADS, self.columns, 16, CPU) for _ in range(3)]
        tiered = (
            tiered_rows(r, *made_of, t, 3) for r, t in zip(recent[1:], self.tiers, strict=True)
        )
        return [FormattedRows(recent[0], *made_of, together=SPAN), *tiered]

    def feed(self, trio: Trio, tokens: int, ended: bool) -> None:
        """New tokens of every row; what has become old is then packed."""
        shape = (trio.plain.sequences, HEADS, tokens)
        new = {
            "position": torch.arange(self.seen, self.seen + tokens).expand(shape),
            "key": torch.randn(*shape, WIDTHS[0]),
            "value": torch.randn(*shape, WIDTHS[1]),
            "mass": torch.rand(shape),
        }
        self.seen, trio.tail = self.seen + tokens, trio.tail + tokens
        for store in trio.stores:
            store.append({name: new[name] for name in store.columns})
            self.pack(store, range(store.sequences) if ended else ())

    def pack(self, store: Store, ended: Sequence[int] = ()) -> None:
        aging = store.aging
        due = aging.due(torch.zeros(store.sequences).long(), ended)
        for b in due:
            if not aging.decided_B[b]:
                key, value = (torch.arange(width).expand(1, HEADS, width) for width in WIDTHS)
                formats = torch.arange(b, b + HEADS)[None] % 2
                aging.decide([b], self.layouts, key, value, formats)
        if due:
            aging.pack_old(due, ended)

    @rule(data=st.data(), tokens=st.integers(1, 300), ended=st.booleans())
    def append(self, data: st.DataObject, tokens: int, ended: bool) -> None:
        self.feed(self.pick(data), tokens, ended and not self.ordered)

    @precondition(lambda self: not self.ordered)
    @rule(
        data=st.data(),
        times=st.sampled_from([1, 20, 90]),
        order=st.sampled_from(["first", "last", "any"]),
        among=st.sampled_from(["all", "some"]),
    )
    def evict(self, data: st.DataObject, times: int, order: str, among: str) -> None:
        """Drops slots one by one."""
        trio = self.pick(data)
        rows = [r for r in range(len(trio.plain.counts)) if among == "all" or r % 2 == 0]
        for _ in range(times):
            position = trio.plain.dense("position").flatten(0, 1)
            places = []
            for r in rows:
                held = (position[r] >= 0).nonzero().flatten()
                held = held[position[r][held].argsort()]
                number = {"first": 0, "last": -1, "any": int(torch.randint(1 << 30, ()))}[order]
                places.append(int(held[number % len(held)]) if len(held) else -1)
            chosen = [r for r, place in zip(rows, places, strict=True) if place >= 0]
            slot = torch.tensor([place for place in places if place >= 0]).long()
            trio.all(lambda s, c=chosen, x=slot: s.evict_one(torch.tensor(c).long(), x))
        trio.tail = 0

    @precondition(lambda self: not self.ordered)
    @rule(data=st.data(), share=st.floats(0, 1), order=st.sampled_from(["first", "last", "any"]))
    def retain(self, data: st.DataObject, share: float, order: str) -> None:
        """Keeps some slots of every row, with new masses."""
        trio = self.pick(data)
        position = trio.plain.dense("position").flatten(0, 1)
        kept = []
        for row in position:
            held = row[row >= 0].sort(descending=order == "last").values
            held = held[torch.randperm(len(held))] if order == "any" else held
            kept.append(held[int(len(held) * share) :])
        counts = torch.tensor([len(x) for x in kept])
        shape = (len(kept), max(1, int(counts.max())))
        positions, masses = torch.full(shape, -1, dtype=torch.int32), torch.rand(shape)
        for r, held in enumerate(kept):
            positions[r, : len(held)] = held
        columns = {"position": positions, "mass": masses}
        by_head = {n: x.view(-1, HEADS, shape[1]) for n, x in columns.items()}
        survivors = Survivors(tuple(range(trio.plain.sequences)), by_head, counts.view(-1, HEADS))
        trio.all(lambda s: s.retain(survivors))
        trio.tail = 0

    @precondition(lambda self: self.columns is MASSIVE)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """New masses of all slots."""
        trio = self.pick(data)
        mass = torch.rand(trio.plain.dense("mass").shape)
        trio.all(lambda s: s.write("mass", mass))

    @precondition(lambda self: any(trio.plain.refills for trio in self.trios))
    @rule(headroom=st.sampled_from([0, 9]))
    def fill(self, headroom: int) -> None:
        """Writes slots anew where none is old."""
        for trio in (trio for trio in self.trios if trio.plain.refills):
            counts = trio.plain.counts_BH
            every = tuple(range(trio.plain.sequences))
            if int(counts.max()):
                columns = trio.plain.dense_by_position(every)
                width = columns["position"].shape[2]
                back = {n: x.flip(2) for n, x in columns.items()}  # slots first, empty ones behind
                trio.all(
                    lambda s, e=every, b=back, c=counts: s.fill([Survivors(e, b, c)], headroom)
                )
                assert width

    @precondition(lambda self: any(trio.tail for trio in self.trios))
    @rule(data=st.data(), tokens=st.integers(1, 300))
    def crop(self, data: st.DataObject, tokens: int) -> None:
        able = [n for n, trio in enumerate(self.trios) if trio.tail]
        trio = self.trios[data.draw(st.sampled_from(able))]
        tokens = min(tokens, trio.tail)
        trio.all(lambda s: s.truncate(tokens))
        trio.tail -= tokens
        if self.ordered:  # there is one; slot s holds token s
            self.seen = int(trio.plain.counts.max())

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        """Reorders, repeats and drops sequences, as beams do."""
        trio = self.pick(data)
        one = st.integers(0, trio.plain.sequences - 1)
        index = data.draw(st.lists(one, min_size=1, max_size=MOST_SEQUENCES))
        trio.stores = trio.all(lambda s: s.select_sequences(index))
        for each in self.trios:
            each.all(lambda s: s.memory.trim())

    @precondition(lambda self: len(self.trios) < MOST_ROWS and not self.ordered)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        trio = self.pick(data)
        index = list(range(trio.plain.sequences))
        self.trios.append(Trio(trio.all(lambda s: s.select_sequences(index)), trio.tail))

    @precondition(lambda self: len(self.trios) > 1)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.trios.remove(self.pick(data))

    @rule(data=st.data())
    def unshare(self, data: st.DataObject) -> None:
        self.pick(data).all(lambda s: s.unshare())

    @rule(data=st.data(), lazy=st.booleans())
    def save_and_load(self, data: st.DataObject, lazy: bool) -> None:
        """Each goes on from what it saved: those in tiers from a session."""
        trio = self.pick(data)
        fresh, states = self.new(trio.plain.sequences), [trio.plain.state()]
        sources = []
        for tiers, store in zip(self.tiers, trio.stores[1:], strict=True):
            with DataFile(self.path / "session", tiers.facts) as file:
                states.append(store.saved(file))
                stays = lazy and tiers.vault is not None
                sources.append(Source(self.path / "session", file.finish(), stays, Syscalls()))
        states = [{name: x.clone() for name, x in state.items()} for state in states]
        trio.stores = []
        fresh[0].load(states[0], lambda kept: self.layouts)
        for tiers, source, store, state in zip(
            self.tiers, sources, fresh[1:], states[1:], strict=True
        ):
            with tiers.reading(source):
                store.load(state, lambda kept: self.layouts)
        trio.stores = fresh

    @invariant()
    def all_hold_the_same_bits(self) -> None:
        for trio in self.trios:
            plain, wide, tight = trio.stores
            assert all(trio.all(lambda s: s.check_integrity()))
            for store in (wide, tight):
                assert store.counts.equal(plain.counts)
                for name in plain.columns:
                    assert store.dense(name).equal(plain.dense(name)), name
            self.attends(plain, wide, tight)

    def attends(self, plain: Store, wide: Store, tight: Store) -> None:
        query = torch.randn(plain.sequences, 2 * HEADS, 1, WIDTHS[0])
        asked = [None, [plain.sequences - 1]]
        for sequences in asked:
            queries = query if sequences is None else query[sequences]
            answers = [
                s.attend(queries, sequences, Logits(0.3), True) for s in (plain, wide, tight)
            ]
            bare, *_ = tight.attend(queries, sequences, Logits(0.3), False)
            assert bare.equal(answers[2][0])
            assert all(a.equal(b) for a, b in zip(answers[1], answers[2], strict=True))
            counts = plain.counts_BH[sequences or slice(None)]
            some = (counts > 0).repeat_interleave(2, dim=1)
            for a, b in zip(answers[0], answers[1], strict=True):
                torch.testing.assert_close(a[some], b[some], rtol=1e-4, atol=1e-5)
        own = (torch.randn(1, HEADS, 3, WIDTHS[0]), torch.randn(1, HEADS, 3, WIDTHS[1]))
        queries = torch.randn(1, 2 * HEADS, 3, WIDTHS[0])
        given = [s.attend_prompt(queries, own, [0], Logits(0.3)) for s in (wide, tight)]
        assert all(a.equal(b) for a, b in zip(*given, strict=True))

    @invariant()
    def nothing_leaks(self) -> None:
        for tiers in self.tiers:
            tiers.collect()
            if tiers.vault is not None:
                tiers.vault.check_integrity()
                assert tiers.vault.bytes_in_flight == 0
            held = 0
            for (_, page_bytes, _), shelf in tiers._shelves.items():
                own = shelf.directory
                used = [t.ids_in_use() for t in tiers.tenants if t.shelf is shelf]
                used_A = torch.cat([*used, torch.zeros(0).long()]).unique()
                assert own.known().nonzero().flatten().equal(used_A)
                held += int((own.at_P[used_A] != NOWHERE).sum()) * page_bytes
            for arena in tiers._arenas.values():
                assert arena.used == held <= arena.size - 2 * arena.half
                assert arena.memory_X.numel() == tiers.caps.device

    def pick(self, data: st.DataObject) -> Trio:
        return self.trios[data.draw(st.integers(0, len(self.trios) - 1))]

    def teardown(self) -> None:
        self.trios.clear()
        for tiers in self.tiers:
            if tiers.vault is not None:
                tiers.vault.close()
        self.folder.__exit__(None, None, None)


TestTiered = Tiered.TestCase
TestTiered.settings = settings(
    max_examples=10,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
