"""What nobody uses of a CPU's arena is no memory of the process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from kvpress.store.tiers.arena import Arena
from kvpress.store.tiers.untouched import untouch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked")
MIB = 1 << 20


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def test_runs_that_are_given_back_are_no_memory_any_more() -> None:
    arena = Arena(64 * MIB, 0, torch.device("cpu"))
    page_A = arena.take(64, MIB)
    arena.pages(MIB)[page_A] = 1
    full = resident()
    arena.give(page_A[16:], MIB)
    assert resident() < full - 44 * MIB
    assert bool((arena.pages(MIB)[page_A[:16]] == 1).all())
    arena.pages(MIB)[arena.take(48, MIB)] = 2
    assert resident() > full - 4 * MIB


def test_bytes_beside_a_run_stay() -> None:
    memory_X = torch.full((MIB,), 7, dtype=torch.uint8)
    untouch(memory_X, 1001, 700_001)
    assert bool((memory_X[:1001] == 7).all()) and bool((memory_X[700_001:] == 7).all())
    assert not memory_X[8192:690_000].any()
    untouch(memory_X, 800_000, 810_000)
    assert bool((memory_X[700_001:] == 7).all()), "few bytes are not worth a call"
