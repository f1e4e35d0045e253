"""What was read from the disk stays at hand until others need its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiers
import torch
from torch import Tensor

from kvpress import TierError
from kvpress.store.tiers.at_hand import Asked
from kvpress.store.tiers.extents import UNIT
from kvpress.store.tiers.record import Record
from kvpress.store.tiers.vault import Vault

WIDTH = 2 * UNIT
SLOTS = 4  # records of one slice that find room in the bounce space: three units each


def made(folder: Path, count: int) -> tuple[Vault, list[Record], list[Tensor]]:
    store = tiers.vault(folder, 64, in_flight_bytes=SLOTS * 3 * UNIT)
    sent = [tiers.slices(1, WIDTH) for _ in range(count)]
    return store, [store.put(x, tiers.owner(1, first=i)) for i, x in enumerate(sent)], sent


def keep(store: Vault, record: Record) -> None:
    with store.fetch(record, [0], keep=True) as ticket:
        ticket.wait()


def at_hand(store: Vault, record: Record, index: int = 0) -> Tensor | None:
    """A copy of a slice that need not be read."""
    near = store.at_hand()
    left = near.find([Asked(record, [index], [0], [0])])
    begins = [*near.begins]
    copy = None if left else store.arena_X[begins[0] : begins[0] + record.slice_bytes].clone()
    near.release()
    return copy


def test_only_what_is_to_be_kept_is(tmp_path: Path) -> None:
    store, records, sent = made(tmp_path, 2)
    tiers.read(store, records[0])
    keep(store, records[1])
    assert at_hand(store, records[0]) is None
    assert torch.equal(at_hand(store, records[1]), sent[1][0])
    assert store.bytes_in_flight == 0 and records[1].pins == 0
    store.check_integrity()
    store.close()


def test_the_one_used_longest_ago_goes_first(tmp_path: Path) -> None:
    store, records, sent = made(tmp_path, SLOTS + 1)
    for record in records[:SLOTS]:
        keep(store, record)
    assert torch.equal(at_hand(store, records[0]), sent[0][0])
    keep(store, records[SLOTS])
    there = [at_hand(store, record) is not None for record in records]
    assert there == [True, False, True, True, True]
    store.check_integrity()
    store.close()


def test_slices_of_a_record_that_was_read_as_a_whole_are_all_at_hand(tmp_path: Path) -> None:
    store = tiers.vault(tmp_path, 64, in_flight_bytes=64 * UNIT)
    record = store.put(sent := tiers.slices(12, UNIT), tiers.owner(12))
    with store.fetch(record, [3, 7], keep=True) as ticket:
        ticket.wait()
    found = [at_hand(store, record, i) for i in range(12)]
    assert [i for i, x in enumerate(found) if x is not None] == [3, 7]
    with store.fetch(record, list(range(10)), keep=True) as ticket:
        ticket.wait()
    assert all(torch.equal(at_hand(store, record, i), sent[i]) for i in range(12))
    store.free(record)
    store.check_integrity()
    assert not store._parts.bounce.held
    store.close()


def test_whoever_needs_the_space_gets_it_but_not_from_under_a_reader(tmp_path: Path) -> None:
    store, records, sent = made(tmp_path, SLOTS)
    for record in records:
        keep(store, record)
    near = store.at_hand()
    assert not near.find([Asked(records[0], [0], [0], [0])])
    record = store.put(more := tiers.slices(1, WIDTH), tiers.owner(1, first=99))
    tickets = [store.fetch(x) for x in (record, *records[2:])]
    assert all(torch.equal(t.wait(), x) for t, x in zip(tickets, (more, *sent[2:]), strict=True))
    assert torch.equal(store.arena_X[near.begins[0] : near.begins[0] + WIDTH], sent[0][0])
    for ticket in tickets:
        ticket.release()
    store.free(records[0])
    store.check_integrity()
    near.release()
    store.check_integrity()
    with pytest.raises(TierError, match="not, or no longer"):
        at_hand(store, records[0])
    store.close()


def test_a_read_that_was_given_up_leaves_nothing(tmp_path: Path) -> None:
    store, records, _ = made(tmp_path, 1)
    store.fetch(records[0], keep=True).release()
    assert store._jobs.wait(lambda: not store._parts.bounce.held or at_hand_of(records[0]), 5)
    store.free(records[0])
    store.check_integrity()
    assert not store._parts.bounce.held
    store.close()


def at_hand_of(record: Record) -> bool:
    return bool(record.kept)
