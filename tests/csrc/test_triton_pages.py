"""Triton kernels that choose pages against the references: on a GPU, or interpreted."""

from __future__ import annotations

from typing import Any

import packing
import pytest
import torch
from boxes import BF16, FP16, FP32, KINDS, all_of, bounds_of, boxes_and_keys, keys_of
from chosen import step_of
from interpreted import DEVICE, Run, run

from kvpress.formulas.page_cells import cell_bytes
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import Always, Logits, Places, RowPages
from kvpress.ops.registry import implementation

pytest.importorskip("triton")

__all__ = ["run"]  # a fixture
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
# Sequences, KV heads, query heads of one, channels, places of a table.
SHAPES = [(1, 1, 1, 1, 1), (2, 2, 3, 20, 7), (1, 2, 4, 128, 70), (1, 1, 2, 256, 16)]


def both(run: Run, name: str, *operands: Any) -> tuple[Any, Any]:
    given, wanted = run(name, *operands), implementation(name, "reference")(*operands)
    return (given, wanted) if isinstance(given, tuple) else ((given,), (wanted,))


@DTYPES
@pytest.mark.parametrize("bits", [(16, 16), (8, 4), (4, 2), (2, 8)], ids=str)
@pytest.mark.parametrize("sizes", [(3, 64, (24, 40), (17, 21)), (2, 32, (128, 5), (128, 5))])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where Triton is interpreted
def test_boxes_equal_the_reference(
    run: Run, sizes: Any, bits: tuple[int, int], dtype: torch.dtype
) -> None:
    pages, slots, widths, kept = sizes
    layout: PageLayout = packing.layout_of(*bits, widths, kept, dtype, slots, (32, 32))
    key, value = (torch.randn(pages, slots, n).to(dtype) for n in widths)
    channels = [packing.subsets(pages, *pair) for pair in zip(kept, widths, strict=True)]
    page = implementation("pack", "reference")(key, value, *channels, list(layout))
    page, *channels, like = (x.to(DEVICE) for x in (page, *channels, key))
    for cell_bits in (0, 2, 4):
        operands = (page, *channels, list(layout), like, cell_bits)
        (box, length, cell), wanted = both(run, "page_bounds", *operands)
        assert torch.equal(box, wanted[0]) and torch.equal(cell, wanted[2])
        torch.testing.assert_close(length, wanted[1], rtol=1e-5, atol=0)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where Triton is interpreted
def test_no_key_of_a_page_gives_a_larger_product(run: Run, kind: str, dtype: torch.dtype) -> None:
    for width, heads in ((40, 3), (128, 1)):
        key_PSD = keys_of(kind, dtype, 11, 6, width)
        box_P2D = boxes_and_keys(key_PSD)
        query = keys_of("mixed", FP32, 1, heads, width)
        query, box_P2D, *rows = (x.to(DEVICE) for x in (query, box_P2D, *all_of(box_P2D)))
        bound = run("score_pages", query, box_P2D, RowPages(*rows))
        page_NP1, alone_NPS = bound[0, :, :11, None], bound[0, :, 11:].view(heads, 11, 6)
        assert bool((page_NP1 >= alone_NPS).all())


@DTYPES
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("width", "heads", "slots"), [(7, 3, 32), (40, 1, 96), (128, 4, 64)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where Triton is interpreted
def test_cells_of_named_pages_equal_the_reference(
    run: Run, width: int, heads: int, slots: int, bits: int, dtype: torch.dtype
) -> None:
    box_P2D, _ = bounds_of(torch.randn(9, slots, width).to(dtype))
    box_P2D[2, 1, 0], box_P2D[3, 0, 1] = float("inf"), float("nan")
    cell_PY = torch.randint(0, 256, (9, cell_bytes(width, slots, bits)), dtype=torch.uint8)
    place_RW, chosen_R = torch.tensor([[0, 2, 3, 7, -1, -1, -1, -1, -1]] * 2), torch.tensor([4, 0])
    rows = [*all_of(box_P2D, rows=2), place_RW.int(), chosen_R]
    query, loose = torch.randn(1, 2 * heads, width), torch.randn(1, 2 * heads, 9) * 50
    query, box, cell, *rows, loose = (x.to(DEVICE) for x in (query, box_P2D, cell_PY, *rows, loose))
    groups = RowPages(*rows[:2]), Places(*rows[2:])
    given, wanted = both(run, "score_cells", query, box, cell, *groups, loose, bits, slots)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def a_step(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Operands of a step of some rows."""
    batch, heads, group, width, places = shape
    torch.manual_seed(places)
    rows, pages = batch * heads, 2 * places + 1
    box_P2D, length_P2 = bounds_of(torch.randn(pages, 3, width).to(dtype))
    named = {
        "query": torch.randn(batch, heads * group, width).to(dtype),
        "box": box_P2D,
        "length": length_P2,
        "table": torch.randint(0, pages, (rows, places)).int(),
        "pages": torch.randint(0, places + 1, (rows,)),
        "span": torch.randint(0, 99, (pages, 2)).sort(1).values.int(),
        "sink": torch.randint(0, 20, (rows,)),
        "from": torch.randint(60, 120, (rows,)),
        "keep": torch.randint(0, places + 1, (rows,)),
    }
    return {name: x.to(DEVICE) for name, x in named.items()}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_equals_the_references(run: Run, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for softcap in (0.0, 4.0):
        x = a_step(shape, dtype)
        rows = RowPages(x["table"], x["pages"])
        (bound,), (wanted,) = both(run, "score_pages", x["query"], x["box"], rows)
        torch.testing.assert_close(bound, wanted, rtol=1e-5, atol=1e-4)
        coarse = (wanted * 2).round()  # many are equal
        for ranked in (wanted, coarse):
            always = Always(x["span"], x["sink"], x["from"])
            (place, chosen), expected = both(run, "choose_pages", ranked, rows, always, x["keep"])
            assert torch.equal(place, expected[0]) and torch.equal(chosen, expected[1])
        read = (Places(place, chosen), x["length"], Logits(0.3, softcap), 16)
        given, expected = both(run, "missed_mass", x["query"], wanted, rows, *read)
        for one, other in zip(given, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("parts", "bits"), [(0, 2), (1, 0), (2, 2)])
def test_a_step_in_one_call_equals_the_reference(run: Run, parts: int, bits: int) -> None:
    operands = step_of(parts, bits).operands(bits, 2, [150, 90, 0, 400], DEVICE)
    given, wanted = both(run, "decode_chosen", *operands)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_infinite_bounds_and_no_numbers_are_read_first(run: Run) -> None:
    inf = float("inf")
    bound = torch.tensor([[[1.0, float("nan"), 3.0, inf, -inf], [5.0, 1.0, 1.0, 1.0, 1.0]]])
    table, pages = torch.arange(5).view(1, 5).int(), torch.tensor([5])
    span = torch.zeros(5, 2, dtype=torch.int32)
    books = (span, torch.zeros(1).long(), torch.ones(1).long(), torch.tensor([3]))
    bound, table, pages, *always, keep = (x.to(DEVICE) for x in (bound, table, pages, *books))
    place, chosen = run("choose_pages", bound, RowPages(table, pages), Always(*always), keep)
    assert place.tolist() == [[0, 1, 3, -1, -1]] and chosen.tolist() == [3]


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no device to wait for")
def test_the_host_does_not_wait(run: Run) -> None:
    x = a_step((1, 2, 4, 128, 70), BF16)
    rows, logits = RowPages(x["table"], x["pages"]), Logits(0.3)
    always = Always(x["span"], x["sink"], x["from"])

    def step() -> None:
        bound = run("score_pages", x["query"], x["box"], rows)
        chosen = Places(*run("choose_pages", bound, rows, always, x["keep"]))
        run("missed_mass", x["query"], bound, rows, chosen, x["length"], logits, 16)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
