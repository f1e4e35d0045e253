"""New records: their slices are copied into the arena, sealed there, and stay or go to the disk."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from kvpress.errors import TierError, TierTimeoutError
from kvpress.store.tiers.host import CopyEngine
from kvpress.store.tiers.moves import Moves
from kvpress.store.tiers.parts import Parts
from kvpress.store.tiers.record import Facts, Owner, Record


class Puts:
    """The way of new records into one vault. Nothing is copied while the lock is held."""

    def __init__(self, parts: Parts, moves: Moves, facts: Facts, engine: CopyEngine) -> None:
        self._parts, self._moves, self._facts, self._engine = parts, moves, facts, engine

    def check(self, slices_AX: Tensor, owner: Owner) -> None:
        """Raises TierError for what are no slices of this owner."""
        shape = tuple(slices_AX.shape)
        whole = len(shape) == 2 and shape[0] == len(owner.heads) and min(shape) > 0
        if not whole or slices_AX.dtype != torch.uint8:
            raise TierError(
                f"Slices of {slices_AX.dtype} {shape} for {len(owner.heads)} heads. Allowed: uint8"
                " [heads, bytes of a slice], at least one of each."
            )
        numbers = (*owner.heads, owner.layer, owner.part, owner.sequence, owner.first, owner.length)
        if not all(isinstance(n, int) and -(2**63) <= n < 2**63 for n in numbers):
            raise TierError(
                f"{owner} does not fit into a header. Allowed: whole numbers of 64 bits."
            )

    def put(self, record: Record, slices_AX: Tensor) -> None:
        """Gives a new record its sealed copy. Raises TierError."""
        self._check_size(record)
        with self._parts.jobs.lock:
            on_host = self._moves.host_place(record)
        if not on_host:
            return self._put_on_disk(record, slices_AX)
        self._fill(record, record.host.place, slices_AX)
        with self._parts.jobs.lock:
            self._moves.sealed_on_host(record)

    def _check_size(self, record: Record) -> None:
        bounce, host = self._parts.bounce.size, self._parts.placement.host.size
        if self._parts.disk is not None and 2 * record.bytes > bounce:
            raise TierError(
                f"A record of {record.bytes} bytes needs {2 * record.bytes} bytes to pass through"
                f" on its way to the disk; {bounce} are there. Raise the host tier to at least"
                f" {4 * record.bytes} bytes."
            )
        if self._parts.disk is None and record.bytes > host:
            raise TierError(
                f"A record of {record.bytes} bytes does not fit into the host tier of {host} bytes."
                f" Raise the host tier to at least {record.bytes} bytes, or add a disk tier."
            )

    def _fill(self, record: Record, place: int, slices_AX: Tensor) -> None:
        """Writes a record into the arena, with header and checksums."""
        begun, arena = time.perf_counter(), self._parts.arena
        begins = record.begins(place, range(record.slices))
        self._engine.copy(arena.rows(begins, record.slice_bytes), slices_AX).wait()
        image = arena.bytes[place : place + record.bytes]
        record.seal(image, self._parts.store, self._facts.digest)
        self._parts.counters.note("put on the host", begun, record.bytes)
        with self._parts.jobs.lock:
            self._parts.counters.to_host.add(record.bytes, time.perf_counter() - begun)

    def _put_on_disk(self, record: Record, slices_AX: Tensor) -> None:
        parts = self._parts
        with parts.jobs.lock:
            self._moves.disk()
            place = parts.wait_bounce(record.bytes)
            if place < 0:
                raise TierTimeoutError(
                    f"{record} was not written within {parts.deadline_s} s: reads and tickets that"
                    f" were not released hold {parts.bounce.held} of {parts.bounce.size} bytes of"
                    " the space that it passes through."
                )
        try:
            self._fill(record, place, slices_AX)
            with parts.jobs.lock:
                job = self._moves.write(record, place, lambda: parts.give_bounce(place))
        except BaseException:
            with parts.jobs.lock:
                parts.give_bounce(place)
            raise
        self._moves.finish(job, f"{record} was not written")
