"""Ranges of bytes to rows of a target: the bytes, who copies them, what is refused."""

from __future__ import annotations

import random
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpress import ops
from kvpress.errors import OperatorError

MOST = 2**63 - 1
MIB = 1 << 20
BACKENDS = pytest.mark.parametrize("backend", ["operator", "reference"])
NATIVE = pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="no C++ compiler here")


def run_of(backend: str) -> Any:
    return ops.copy_ranges if backend == "operator" else ops.implementation("copy_ranges", backend)


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@BACKENDS
@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_rows_are_the_ranges_and_others_stay(threads: int, backend: str) -> None:
    torch.manual_seed(threads)
    rng = random.Random(threads)
    for width in (1, 7, 4096, 100_000):
        rows, count = rng.choice(((1, 1), (9, 5), (300, 300), (300, 170)))
        source = bytes_of(width + rng.choice((0, 1, 50_000)))
        to_A = torch.randperm(rows)[:count]
        begin_A = torch.randint(0, len(source) - width + 1, (count,))
        target = bytes_of(rows, width)
        wanted = target.clone()
        wanted[to_A] = source[begin_A[:, None] + torch.arange(width)]
        assert run_of(backend)(target, to_A, source, begin_A, threads) is None
        assert torch.equal(target, wanted)


@NATIVE
def test_tasks_of_several_threads_end_where_ranges_do() -> None:
    for width in (MIB // 3, MIB, MIB + 1, 9 * MIB):  # each in 30 MiB and more: 8 threads at most
        count = 30 * MIB // width + 1
        target, source = torch.zeros(count, width, dtype=torch.uint8), bytes_of(count + width)
        to_A = torch.randperm(count)
        ops.copy_ranges(target, to_A, source, torch.arange(count), 64)
        for begin, row in enumerate(to_A.tolist()):
            assert torch.equal(target[row], source[begin : begin + width])


@BACKENDS
def test_nothing_to_copy(backend: str) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    target, source = bytes_of(3, 4), bytes_of(10)
    before = target.clone()
    run_of(backend)(target, nothing, source, nothing, 2)
    run_of(backend)(target, nothing, source[:0], nothing)
    assert torch.equal(target, before)
    run_of(backend)(bytes_of(3, 0), torch.tensor([2, 0]), source, torch.tensor([10, 0]), 2)
    run_of(backend)(bytes_of(0, 4), nothing, source, nothing)


@NATIVE
def test_bytes_are_copied_without_the_lock_of_the_interpreter() -> None:
    """A thread that keeps the lock sees them come; one that came too late tries again."""
    target, source = torch.zeros(1, 64 * MIB, dtype=torch.uint8), torch.ones(64 * MIB).byte()
    memory, first_A, seen = target.view(-1).numpy().data, torch.tensor([0]), list[int]()
    interval = sys.getswitchinterval()

    def watch() -> None:
        begun.wait()
        seen[:], until = [memory[-1]], time.monotonic() + 120
        while not memory[-1] and time.monotonic() < until:
            pass
        seen.append(memory[-1])

    for _ in range(100):
        begun, watcher = threading.Event(), threading.Thread(target=watch)
        target.zero_()
        watcher.start()
        sys.setswitchinterval(1000)  # nobody gives up the lock but of its own accord
        try:
            begun.set()
            ops.copy_ranges(target, first_A, source, first_A)
        finally:
            sys.setswitchinterval(interval)
        watcher.join()
        if not seen[0]:
            break
    assert seen == [0, 1]


def test_many_callers_at_once() -> None:
    source, to_A = bytes_of(20 * MIB), torch.arange(20)
    targets = [torch.zeros(20, MIB, dtype=torch.uint8) for _ in range(4)]
    callers = [
        threading.Thread(target=ops.copy_ranges, args=(x, to_A, source, to_A * MIB, 3))
        for x in targets
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(x.view(-1), source) for x in targets)


def good() -> dict[str, Any]:
    """Ranges of 8 bytes that are accepted."""
    return {
        "target_PX": torch.full((5, 8), 0xEE, dtype=torch.uint8),
        "to_A": torch.tensor([3, 0, 4]),
        "source": torch.arange(20, dtype=torch.uint8),
        "begin_A": torch.tensor([12, 0, 5]),
    }


def numbers(name: str, place: int, value: int) -> dict[str, Any]:
    changed = good()[name]
    changed[place] = value
    return {name: changed}


@BACKENDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (numbers("to_A", 2, -1), "range 2 goes to row -1 of 5"),
        (numbers("to_A", 2, 5), "range 2 goes to row 5 of 5"),
        (numbers("to_A", 1, MOST), f"range 1 goes to row {MOST} of 5"),
        (numbers("to_A", 1, -(2**63)), "range 1 goes to row -9223372036854775808 of 5"),
        (numbers("to_A", 2, 3), "two ranges go to row 3"),
        (numbers("to_A", 1, 3), "two ranges go to row 3"),
        (numbers("begin_A", 2, -1), "range 2 of 8 bytes from -1 on .* which has 20 bytes"),
        (numbers("begin_A", 0, 13), "range 0 of 8 bytes from 13 on .* which has 20 bytes"),
        (numbers("begin_A", 1, MOST), f"range 1 of 8 bytes from {MOST} on"),
        (numbers("begin_A", 1, -(2**63)), "range 1 of 8 bytes from -9223372036854775808 on"),
        ({"source": torch.zeros(7, dtype=torch.uint8)}, "range 0 of 8 bytes from 12 on .* 7 bytes"),
        ({"source": torch.zeros(0, dtype=torch.uint8)}, "range 0 of 8 bytes from 12 on .* 0 bytes"),
        ({"threads": 0}, "threads is 0; 1 to 64 are allowed"),
        ({"threads": 65}, "threads is 65; 1 to 64 are allowed"),
        ({"threads": -(2**63)}, "threads is -9223372036854775808; 1 to 64"),
        ({"to_A": torch.tensor([3, 0])}, r"begin_A has shape \[3\], but A is 2"),
        ({"begin_A": torch.tensor([3])}, r"begin_A has shape \[1\], but A is 3"),
        ({"to_A": torch.tensor([[3, 0, 4]])}, "to_A has 2 dimensions"),
        ({"target_PX": torch.zeros(40, dtype=torch.uint8)}, "target_PX has 1 dimensions"),
        ({"source": torch.zeros(5, 4, dtype=torch.uint8)}, r"\[5, 4\]; it must be a list of bytes"),
        ({"target_PX": torch.zeros(5, 8, dtype=torch.int8)}, "target_PX .*must be .*uint8"),
        ({"source": torch.zeros(20, dtype=torch.int8)}, "source .*must be .*uint8"),
        ({"to_A": torch.tensor([3, 0, 4]).int()}, "to_A .*must be .*int64"),
        ({"begin_A": torch.tensor([0, 0, 0]).int()}, "begin_A .*must be .*int64"),
        ({"target_PX": torch.zeros(8, 5, dtype=torch.uint8).t()}, "target_PX must be contiguous"),
        ({"source": torch.zeros(40, dtype=torch.uint8)[::2]}, "source must be contiguous"),
        ({"to_A": torch.arange(6)[::2]}, "to_A must be contiguous"),
        ({"begin_A": torch.arange(6)[::2]}, "begin_A must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_byte_is_written(
    change: dict[str, Any], message: str, backend: str
) -> None:
    call = good() | change
    before = call["target_PX"].clone()
    with pytest.raises(OperatorError, match=message):
        run_of(backend)(**call)
    assert torch.equal(call["target_PX"], before)


@BACKENDS
def test_memory_that_is_written_is_no_other_operands(backend: str) -> None:
    memory = torch.zeros(100, dtype=torch.uint8)
    call = good() | {"target_PX": memory[:40].view(5, 8), "source": memory[39:59]}
    with pytest.raises(OperatorError, match="share memory"):
        run_of(backend)(**call)
    run_of(backend)(**call | {"source": memory[40:60]})
    held = torch.arange(5)
    with pytest.raises(OperatorError, match="share memory"):
        run_of(backend)(
            **good() | {"target_PX": held.view(torch.uint8).view(5, 8), "to_A": held[:3]}
        )


def test_copy_ranges_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.kvpress.copy_ranges.default, (*good().values(), 2))
