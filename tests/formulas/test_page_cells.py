"""Where the cells of keys lie in bytes."""

from __future__ import annotations

import pytest
import torch

from kvpress.formulas.page_cells import cell_bytes, from_cells, to_cells

BITS = pytest.mark.parametrize("bits", [2, 4])


@BITS
@pytest.mark.parametrize("width", [1, 4, 7, 64, 128])
@pytest.mark.parametrize("slots", [32, 96, 128])
def test_bytes_hold_every_cell(width: int, slots: int, bits: int) -> None:
    code_PSD = torch.randint(0, 2**bits, (3, slots, width), dtype=torch.uint8)
    cell_PY = to_cells(code_PSD, bits)
    assert cell_PY.dtype == torch.uint8 and cell_PY.shape == (3, cell_bytes(width, slots, bits))
    assert torch.equal(from_cells(cell_PY, width, slots, bits), code_PSD)


@BITS
def test_a_unit_is_eight_slots_of_four_channels(bits: int) -> None:
    """Slot 13, channel 6: the second field of the byte of slot 5, channel 2 of the second unit."""
    code_PSD = torch.zeros(1, 64, 8, dtype=torch.uint8)
    code_PSD[0, 13, 6] = 3
    (byte,) = to_cells(code_PSD, bits)[0].nonzero().flatten().tolist()
    assert byte == 32 + 5 * 4 + 2 and int(to_cells(code_PSD, bits)[0, byte]) == 3 << bits


def test_bits_of_a_key_are_all_there_is() -> None:
    assert cell_bytes(128, 64, 2) == 128 * 64 * 2 // 8
    assert cell_bytes(5, 32, 4) == 8 * 32 * 4 // 8  # channels are filled up to fours
    assert cell_bytes(128, 64, 0) == 0
