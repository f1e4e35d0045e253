"""A shelf: what pages of one size have on a device, whatever their formats are."""

from __future__ import annotations

import torch

from kvpress.store.tiers.caps import Caps
from kvpress.store.tiers.tiers import Tiers

MIB, PAGE = 1 << 20, 4096


def test_formats_of_equal_bytes_and_other_slots_have_positions_of_their_own() -> None:
    shelf = Tiers(Caps(MIB), "none").shelf(torch.device("cpu"), PAGE, 0, PAGE)
    few, many = shelf.positions(32), shelf.positions(64)
    assert few.shape == (MIB // PAGE, 32) and many.shape == (MIB // PAGE, 64)
    assert shelf.positions(32) is few and shelf.positions(64) is many
    assert shelf.nbytes == few.nbytes + many.nbytes
