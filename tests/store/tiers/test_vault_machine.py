"""Random sequences of operations on a vault, against a plain dictionary."""

from __future__ import annotations

import tempfile
from pathlib import Path

import tiers
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvpress import TierError, TierTimeoutError
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.record import Record, State
from kvpress.store.tiers.ticket import Ticket

STATES = {State.ABSENT, State.SEALED}  # between two calls of one thread


class Kept(RuleBasedStateMachine):
    """Puts, reads of all or some slices, frees, demotions, promotions, on small tiers."""

    @initialize(
        host=st.sampled_from([0, 8, 24, 60]),
        disk=st.sampled_from([None, 4, 12, 200]),
        direct=st.booleans(),
        workers=st.integers(1, 3),
    )
    def start(self, host: int, disk: int | None, direct: bool, workers: int) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=folder())
        calls = tiers.Faulty(**({} if direct else {"open": tiers.no_direct}))
        self.store = tiers.vault(
            Path(self.folder.name) if disk else None,
            disk or 0,
            host * UNIT if disk else max(host, 8) * UNIT,
            calls=calls,
            workers=workers,
            deadline_s=0.1,
            in_flight_bytes=16 * UNIT,
        )
        self.disk = disk is not None
        self.plain: dict[Record, Tensor] = {}
        self.tickets: list[tuple[Ticket, Record, Tensor]] = []
        self.freed: set[Record] = set()

    @rule(
        heads=st.integers(1, 4),
        width=st.sampled_from([1, 500, 2048, 4096]),
        seed=st.integers(0, 99),
    )
    def put(self, heads: int, width: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        sent = torch.randint(256, (heads, width), dtype=torch.uint8, generator=draw)
        held = self.store.bytes_host, self.store.bytes_disk
        try:
            record = self.store.put(sent, tiers.owner(heads, seed))
        except TierError:
            # Room may have been made on the host, never lost.
            assert self.store.bytes_host + self.store.bytes_disk <= sum(held) + held[0]
        else:
            self.plain[record] = sent

    @precondition(lambda self: self.plain)
    @rule(data=st.data(), priority=st.integers(0, 2))
    def fetch(self, data: st.DataObject, priority: int) -> None:
        record = data.draw(st.sampled_from(list(self.plain)))
        every = st.permutations(range(record.slices))
        count = data.draw(st.integers(1, record.slices))
        wanted = data.draw(st.none() | every.map(lambda order: order[:count]))
        ticket = self.store.fetch(record, wanted, priority)
        self.tickets.append((ticket, record, self.plain[record][wanted or slice(None)]))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), cancel=st.booleans())
    def end(self, data: st.DataObject, cancel: bool) -> None:
        ticket, _, sent = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        if cancel:
            return ticket.cancel()
        try:
            assert torch.equal(ticket.wait(), sent)
            assert ticket.ready
        except TierTimeoutError:  # others hold the space: they are fewer now
            assert self.tickets
        ticket.release()

    @precondition(lambda self: self.plain)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(list(self.plain)))
        self.store.free(record)
        del self.plain[record]
        self.freed.add(record)

    @precondition(lambda self: self.plain)
    @rule(data=st.data(), down=st.booleans())
    def move(self, data: st.DataObject, down: bool) -> None:
        record = data.draw(st.sampled_from(list(self.plain)))
        try:
            self.store.demote(record) if down else self.store.promote(record)
        except TierError:
            return
        assert (record.disk if down else record.host).sealed

    @invariant()
    def all_is_there(self) -> None:
        if not hasattr(self, "store"):
            return
        store = self.store
        store.check_integrity()
        for record in self.plain:
            states = record.host.state, record.disk.state
            assert State.SEALED in states and STATES.issuperset(states)
        pinned = {record for _, record, _ in self.tickets}
        assert all(record.host.sealed or record.disk.sealed for record in pinned)
        assert store.bytes_host <= store.capacity_host
        assert store.bytes_disk <= store.capacity_disk

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for ticket, _, sent in self.tickets:
            if ticket.ready:
                assert torch.equal(ticket.wait(), sent)
            ticket.release()
        for record, sent in self.plain.items():
            assert torch.equal(tiers.read(self.store, record), sent)
            self.store.free(record)
        self.store.check_integrity()
        assert self.store._jobs.wait(lambda: not self.store.bytes_in_flight, 5)
        assert self.store.bytes_host == self.store.bytes_disk == 0
        self.store.close()
        assert tiers.left(Path(self.folder.name)) == []
        self.folder.cleanup()


def folder() -> Path | None:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


TestKept = Kept.TestCase
TestKept.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
