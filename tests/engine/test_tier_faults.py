"""A disk that fails under a whole model: exact output or a typed error, and others go on."""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import tiered
import tiers
import torch
from torch import Tensor

import kvpress
from kvpress.store.tiers.vault import Vault

TOKENS = 560
MODEL = tiered.model()
Fault = Callable[..., Any]


class Disk(tiers.Faulty):
    """A disk that works until a test says otherwise."""

    def __init__(self) -> None:
        super().__init__(preadv=self._asked("preadv"), pwritev=self._asked("pwritev"))
        self.now: dict[str, Fault] = {}

    def _asked(self, name: str) -> Fault:
        def asked(number: int, real: Fault, *arguments: Any) -> Any:
            fault = self.now.get(name)
            return fault(number, real, *arguments) if fault else real(*arguments)

        return asked


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    calls = Disk()
    made = functools.partial(Vault, calls=calls, deadline_s=0.5)
    monkeypatch.setattr("kvpress.store.tiers.tiers.Vault", made)
    return calls


def caps(folder: Path, sequences: int = 2) -> dict[str, Any]:
    return tiered.caps("disk", MODEL, "full", sequences, folder)


def read(engine: Any, seed: int = 0) -> tuple[Any, list[Tensor]]:
    cache = engine.new_cache()
    return cache, tiered.feed(MODEL, cache, helpers.prompt(1, TOKENS, seed), [400, 160])


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    """Logits of a prompt and four tokens."""
    with tiered.attached(MODEL, "full", tiered.ALL) as engine:
        cache, found = read(engine)
        return found + tiered.decode(MODEL, cache, found[-1], 4)


def once(fault: Fault) -> Fault:
    """A fault of the first call only."""
    left = [fault]
    return lambda number, real, *given: (left.pop() if left else _real)(number, real, *given)


def _real(number: int, real: Fault, *arguments: Any) -> Any:
    return real(*arguments)


def interrupted(number: int, real: Fault, *arguments: Any) -> Any:
    raise InterruptedError


def corrupted(number: int, real: Fault, fd: int, buffers: Any, offset: int) -> int:
    """One bit of what is read is another."""
    done = real(fd, buffers, offset)
    view = memoryview(buffers[0]).cast("B")
    view[done // 2] ^= 1
    return done


def slow(number: int, real: Fault, *arguments: Any) -> Any:
    time.sleep(0.01)
    return real(*arguments)


HARMLESS = {
    "EIO once": {"preadv": once(tiers.fails(errno.EIO))},
    "another bit once": {"preadv": once(corrupted)},
    "interrupted": {"preadv": once(interrupted), "pwritev": once(interrupted)},
    "short": {"preadv": tiers.short(40960), "pwritev": tiers.short(40960)},
    "slow": {"preadv": slow, "pwritev": slow},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_passes_changes_nothing(
    name: str, disk: Disk, expected: list[Tensor], tmp_path: Path
) -> None:
    with tiered.attached(MODEL, "full", caps(tmp_path)) as engine:
        disk.now = HARMLESS[name]
        cache, found = read(engine)
        found += tiered.decode(MODEL, cache, found[-1], 4)
        assert tiered.below(cache)
        tiered.check(engine, cache)
        assert tiered.nothing_stays_in_flight(engine.spec.tiers)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


FATAL: dict[str, tuple[type[Exception], str, Fault]] = {
    "EIO": (kvpress.TierError, "preadv", tiers.fails(errno.EIO)),
    "the end": (kvpress.TierError, "preadv", lambda number, real, *given: 0),
    "another bit": (kvpress.TierIntegrityError, "preadv", corrupted),
    "no write": (kvpress.TierError, "pwritev", tiers.fails(errno.EIO)),
    "no room": (kvpress.TierError, "pwritev", tiers.fails(errno.ENOSPC)),
}


def goes_wrong(engine: Any, cache: Any, error: type[Exception], new: int = 200) -> None:
    """Decodes until an error, which leaves a cache that says that it is not whole."""
    with pytest.raises(error) as raised:
        tiered.feed(MODEL, cache, helpers.prompt(1, new, seed=8), [1, new - 1])
    assert isinstance(raised.value, kvpress.TierError) and len(str(raised.value)) > 30
    for use in (
        lambda: tiered.feed(MODEL, cache, helpers.prompt(1, 1), [1]),
        cache.fork,
        lambda: cache.crop(-1),
        lambda: cache.save("never"),
    ):
        with pytest.raises(kvpress.CacheError, match=r"reset\(\)"):
            use()


@pytest.mark.parametrize("name", FATAL)
def test_what_does_not_pass_is_a_typed_error(
    name: str, disk: Disk, expected: list[Tensor], tmp_path: Path
) -> None:
    error, call, fault = FATAL[name]
    with tiered.attached(MODEL, "full", caps(tmp_path)) as engine:
        cache, found = read(engine)
        other, others = read(engine)
        disk.now = {call: fault}
        goes_wrong(engine, cache, error)
        disk.now = {}
        others += tiered.decode(MODEL, other, others[-1], 4)  # as if nothing had been
        assert all(torch.equal(a, b) for a, b in zip(others, expected, strict=True))
        cache.reset()
        again = tiered.feed(MODEL, cache, helpers.prompt(1, TOKENS), [400, 160])
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
        tiered.check(engine, cache, other)
        assert tiered.nothing_stays_in_flight(engine.spec.tiers)


def test_a_disk_that_hangs(disk: Disk, expected: list[Tensor], tmp_path: Path) -> None:
    """The deadline passes; the read ends later, and everything goes on."""
    goes_on = threading.Event()

    def hangs(number: int, real: Fault, *arguments: Any) -> Any:
        goes_on.wait(30)
        return real(*arguments)

    before = tiered.threads()
    with tiered.attached(MODEL, "full", caps(tmp_path)) as engine:
        cache, _ = read(engine)
        disk.now = {"preadv": hangs}
        begun = time.monotonic()
        goes_wrong(engine, cache, kvpress.TierTimeoutError)
        assert time.monotonic() - begun < 15
        disk.now = {}
        goes_on.set()
        cache.reset()
        found = tiered.feed(MODEL, cache, helpers.prompt(1, TOKENS), [400, 160])
        found += tiered.decode(MODEL, cache, found[-1], 4)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        tiered.check(engine, cache)
    assert not tiered.threads() - before


@pytest.mark.parametrize("what", ["bits", "zeros", "swapped", "cut"])
def test_a_file_that_others_wrote_to(what: str, disk: Disk, tmp_path: Path) -> None:
    with tiered.attached(MODEL, "full", caps(tmp_path)) as engine:
        cache, _ = read(engine)
        fd, size = disk.files[0], os.fstat(disk.files[0]).st_size
        held = bytearray(os.pread(fd, size, 0))
        if what == "bits":
            held[5000::40000] = bytes(x ^ 4 for x in held[5000::40000])
        elif what == "zeros":
            held[:] = bytes(size)
        elif what == "swapped":  # two records of equal size
            step = engine.spec.tiers.vault.bytes_disk // len(
                engine.spec.tiers.vault._placement.records
            )
            held[:step], held[step : 2 * step] = held[step : 2 * step], held[:step]
        if what == "cut":
            os.ftruncate(fd, 0)
        else:
            os.pwrite(fd, bytes(held), 0)
        goes_wrong(engine, cache, kvpress.TierIntegrityError)
        assert engine.spec.tiers.vault.counters.integrity_failures > 0


def test_a_dropped_engine_ends_its_threads(tmp_path: Path) -> None:
    before = tiered.threads()  # those of a call that hung may still be there
    for _ in range(3):
        with tiered.attached(MODEL, "full", caps(tmp_path)) as engine:
            read(engine)
            assert tiered.threads() - before
    assert not tiered.threads() - before
    assert tiers.left(tmp_path) == []
