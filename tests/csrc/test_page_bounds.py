"""Boxes of pages: the ends of what kernels read, rounded outwards; lengths that nothing passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import packing
import pytest
import torch
from boxes import BACKENDS, BF16, DTYPES, FP16, FP32, INF, NAN, run_of
from torch import Tensor

from kvpress import ops
from kvpress.formulas.page_cells import from_cells
from kvpress.formulas.page_layout import PageLayout


class Packed:
    """Some pages, and what kernels read from them in fp32."""

    def __init__(
        self, bits: tuple[int, int], dtype: torch.dtype, sizes: Any = None, scale: float = 1.0
    ) -> None:
        pages, slots, widths, kept = sizes or (5, 64, (24, 40), (17, 21))
        self.layout: PageLayout = packing.layout_of(*bits, widths, kept, dtype, slots, (32, 32))
        key = (torch.randn(pages, slots, widths[0]) * scale).to(dtype)
        value = (torch.randn(pages, slots, widths[1]) * 3 + 1).to(dtype)
        self.fill(key, value)

    def fill(self, key_PSD: Tensor, value_PSE: Tensor) -> None:
        self.like, pages = key_PSD.new_empty(0), len(key_PSD)
        own = [
            packing.subsets(pages, *pair)
            for pair in (
                (self.layout.key_kept, key_PSD.shape[2]),
                (self.layout.value_kept, value_PSE.shape[2]),
            )
        ]
        pack = ops.implementation("pack", "reference")
        page_PX = pack(key_PSD, value_PSE, *own, list(self.layout))
        self.operands = (page_PX, *own, list(self.layout))
        unpack = ops.implementation("unpack", "reference")
        if min(self.layout.key_bits, self.layout.value_bits) == 16:
            self.key_PSD, self.value_PSE = unpack(*self.operands, self.like)
        else:  # in fp32 nothing is rounded: codes have the same steps
            self.key_PSD, self.value_PSE = self._widened(unpack)

    def _widened(self, unpack: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        from kvpress.csrc.unpack.reference import numbers

        page_PX, channel_PC, channel_PU, _ = self.operands
        return numbers(page_PX, channel_PC, channel_PU, self.layout, self.like.dtype)

    def bounds(self, backend: str) -> tuple[Tensor, Tensor]:
        box_P2D, length_P2, _ = run_of(backend, "page_bounds")(*self.operands, self.like, 0)
        return box_P2D, length_P2

    def cells(self, backend: str, bits: int) -> tuple[Tensor, Tensor]:
        """Boxes, and the numbers of the cells of all keys: fp32 `[P, S, D]`."""
        operands = (*self.operands, self.like, bits)
        box_P2D, _, cell_PY = run_of(backend, "page_bounds")(*operands)
        sizes = (self.layout.key_width, self.layout.slots, bits)
        return box_P2D, from_cells(cell_PY, *sizes).float()


ALL_BITS = [(16, 16), (8, 8), (4, 2), (2, 4), (16, 4), (4, 16)]


@BACKENDS
@DTYPES
@pytest.mark.parametrize("bits", ALL_BITS, ids=str)
def test_boxes_are_the_tightest_around_what_is_read(
    bits: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    packed = Packed(bits, dtype)
    box_P2D, length_P2 = packed.bounds(backend)
    low_PD, high_PD = packed.key_PSD.float().amin(1), packed.key_PSD.float().amax(1)
    assert box_P2D.dtype == dtype and length_P2.dtype == FP32
    for end_PD, exact_PD, sign in ((box_P2D[:, 0], low_PD, -1), (box_P2D[:, 1], high_PD, 1)):
        assert bool(((end_PD.float() - exact_PD) * sign >= 0).all())
        inside_PD = torch.nextafter(end_PD, torch.tensor(-sign * INF, dtype=dtype))
        assert bool((((inside_PD.float() - exact_PD) * sign < 0) | (end_PD == exact_PD)).all())
    if bits[0] == 16:
        assert torch.equal(box_P2D[:, 0].float(), low_PD)
        assert torch.equal(box_P2D[:, 1].float(), high_PD)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("bits", ALL_BITS, ids=str)
def test_nothing_is_longer_than_the_lengths(
    bits: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    packed = Packed(bits, dtype)
    box_P2D, length_P2 = packed.bounds(backend)
    corner_P = box_P2D.double().abs().amax(1).norm(dim=1)
    value_P = packed.value_PSE.double().norm(dim=2).amax(1)
    for length_P, exact_P in ((length_P2[:, 0], corner_P), (length_P2[:, 1], value_P)):
        assert bool((length_P.double() >= exact_P).all())
        torch.testing.assert_close(length_P.double(), exact_P, rtol=2e-4, atol=0)
    assert bool((packed.key_PSD.double().norm(dim=2).amax(1) <= length_P2[:, 0].double()).all())


@BACKENDS
@DTYPES
def test_dropped_channels_have_empty_boxes(dtype: torch.dtype, backend: str) -> None:
    packed = Packed((4, 4), dtype)
    box_P2D, _ = packed.bounds(backend)
    dropped_PD = torch.ones(box_P2D[:, 0].shape, dtype=torch.bool)
    dropped_PD.scatter_(1, packed.operands[1].long(), False)
    assert dropped_PD.any() and not box_P2D.mT[dropped_PD].any()


@DTYPES
@pytest.mark.parametrize("slots", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [(16, 16), (8, 4), (4, 8), (2, 2)], ids=str)
def test_backends_agree_on_every_bit_of_boxes(
    bits: tuple[int, int], slots: int, dtype: torch.dtype
) -> None:
    sizes = (3, slots, (128, 64), (127, 61))
    packed = Packed(bits, dtype, sizes)
    (box_P2D, length_P2), (wanted_P2D, wanted_P2) = map(packed.bounds, ("operator", "reference"))
    assert torch.equal(box_P2D, wanted_P2D)
    torch.testing.assert_close(length_P2, wanted_P2, rtol=1e-6, atol=0)


CELLS = pytest.mark.parametrize("cell_bits", [2, 4])


@BACKENDS
@DTYPES
@CELLS
@pytest.mark.parametrize("bits", ALL_BITS, ids=str)
def test_every_key_is_in_its_cell(
    bits: tuple[int, int], cell_bits: int, dtype: torch.dtype, backend: str
) -> None:
    packed = Packed(bits, dtype)
    box_P2D, code_PSD = packed.cells(backend, cell_bits)
    low_P1D, high_P1D = (end_PD[:, None].double() for end_PD in box_P2D.unbind(1))
    part_P1D = (high_P1D - low_P1D) / 2**cell_bits
    key_PSD, slack_P1D = packed.key_PSD.double(), part_P1D * 2.0**-20
    assert bool((low_P1D + code_PSD * part_P1D <= key_PSD + slack_P1D).all())
    assert bool((low_P1D + (code_PSD + 1) * part_P1D >= key_PSD - slack_P1D).all())
    assert int(code_PSD.max()) == 2**cell_bits - 1


@DTYPES
@CELLS
@pytest.mark.parametrize("slots", [32, 96])
@pytest.mark.parametrize("bits", [(16, 16), (8, 4), (2, 2)], ids=str)
def test_backends_agree_on_every_cell(
    bits: tuple[int, int], slots: int, cell_bits: int, dtype: torch.dtype
) -> None:
    packed = Packed(bits, dtype, (3, slots, (127, 64), (125, 61)))
    if bits[0] == 16 and dtype != FP16:  # the largest numbers, whose reciprocals are subnormal
        huge_PSD = (torch.randn(3, slots, 127).clamp(-1, 1) * 1e38).to(dtype)
        packed.fill(huge_PSD, torch.randn(3, slots, 64).to(dtype))
    (_, given), (_, wanted) = (packed.cells(each, cell_bits) for each in ("operator", "reference"))
    assert torch.equal(given, wanted) and wanted.any()


@BACKENDS
def test_keys_without_a_place_in_the_box_are_in_its_first_cell(backend: str) -> None:
    """Boxes without extent, of a denormal one, of infinite ends and of no number."""
    packed = Packed((16, 16), FP32, (1, 32, (6, 4), (6, 4)))
    key = torch.zeros(1, 32, 6)
    key[0, ::2, 0], key[0, 3, 1], key[0, 4, 2], key[0, :, 3] = 1, INF, NAN, 7
    key[0, 5, 4], key[0, ::2, 5] = 2.0**-149, -INF
    packed.fill(key, torch.zeros(1, 32, 4))
    _, code_PSD = packed.cells(backend, 2)
    assert not code_PSD[..., 1:].any() and set(code_PSD[0, :, 0].tolist()) == {0, 3}


@BACKENDS
@pytest.mark.parametrize("number", [0.0, -0.0, 1e-42, -1e-42, 3e38, -65504.0, 7.25])
def test_equal_keys_have_a_box_without_extent(number: float, backend: str) -> None:
    for dtype in (FP32, BF16, FP16):
        if not torch.tensor(number).to(dtype).isfinite():
            continue
        packed = Packed((16, 16), dtype, (1, 32, (4, 4), (4, 4)))
        key = torch.full((1, 32, 4), number).to(dtype)
        packed.fill(key, key)
        box_P2D, _ = packed.bounds(backend)
        assert torch.equal(box_P2D, key[:, :2])


@BACKENDS
@DTYPES
def test_what_is_no_number_is_in_the_box(dtype: torch.dtype, backend: str) -> None:
    packed = Packed((16, 16), dtype, (3, 32, (4, 4), (4, 4)))
    key, value = (torch.ones(3, 32, 4).to(dtype) for _ in range(2))
    key[0, 3, 1], value[1, 5, 2], key[2, 15, 0] = NAN, NAN, INF
    packed.fill(key, value)
    box_P2D, length_P2 = packed.bounds(backend)
    assert bool(box_P2D[0, :, 1].isnan().all()) and int(box_P2D.isnan().sum()) == 2
    assert box_P2D[2, 1, 0] == INF and box_P2D[2, 0, 0] == 1
    assert length_P2[0, 0].isnan() and length_P2[1, 1].isnan() and length_P2[2, 0] == INF
    assert int(length_P2.isnan().sum()) == 2


@BACKENDS
def test_ends_beyond_a_dtype_are_infinite(backend: str) -> None:
    """A step is rounded up: of the largest keys in fp16 the dequantised ones may be larger."""
    packed = Packed((4, 16), FP16, (1, 64, (2, 4), (2, 4)))
    key = torch.full((1, 64, 2), 65504.0)
    key[:, ::2] = -65504.0
    packed.fill(key.half(), torch.zeros(1, 64, 4).half())
    box_P2D, length_P2 = packed.bounds(backend)
    assert float(packed.key_PSD.max()) > 65504 and bool((box_P2D[0, 1] == INF).all())
    assert bool(box_P2D[0, 0].isfinite().all()) and length_P2[0, 0] == INF


def test_the_bits_depend_neither_on_threads_nor_on_other_pages() -> None:
    for bits in ((16, 16), (4, 4)):
        packed = Packed(bits, BF16, (70, 64, (64, 64), (60, 50)))
        torch.set_num_threads(1)
        whole = packed.bounds("operator")
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for given, wanted in zip(packed.bounds("operator"), whole, strict=True):
                assert torch.equal(given, wanted)
        page_PX, *channels, layout = packed.operands
        alone = [x[7:8].contiguous() for x in (page_PX, *channels)]
        made = ops.page_bounds(*alone, layout, packed.like, 0)[:2]
        for given, wanted in zip(made, whole, strict=True):
            assert torch.equal(given, wanted[7:8])


@BACKENDS
def test_no_pages_have_no_boxes(backend: str) -> None:
    packed = Packed((4, 16), BF16)
    page_PX, *channels, layout = packed.operands
    none = [x[:0] for x in (page_PX, *channels)]
    given = run_of(backend, "page_bounds")(*none, layout, packed.like, 2)
    assert [tuple(x.shape) for x in given] == [(0, 2, 24), (0, 2), (0, 24 * 64 // 4)]
