"""Pages of old slots: `pack`, `unpack`, and `decode_rows` over them, against their references."""

from __future__ import annotations

import itertools

import packing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpress.csrc.pack.reference import quantise

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.formulas.page_layout import PageLayout, from_bytes, to_bytes
from kvpress.ops import Logits, Old, Pages

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BITS = (16, 8, 4, 2)
# id: widths, kept, slots, groups
SHAPES = {
    "D64": ((64, 64), (64, 64), 64, (64, 64)),
    "D64-T39": ((64, 64), (39, 64), 64, (32, 32)),
    "D64-S32": ((64, 64), (64, 64), 32, (32, 64)),
    "D80-U48": ((80, 80), (80, 48), 128, (128, 32)),
    "D128-T77-U33": ((128, 128), (77, 33), 64, (64, 128)),
    "D256-E32": ((256, 32), (256, 32), 128, (64, 64)),
}
COMBINATIONS = [
    pytest.param(*pair, shape, dtype, id=f"K{pair[0]}-V{pair[1]}-{name}-{str(dtype)[6:]}")
    for number, (pair, (name, shape)) in enumerate(
        itertools.product(itertools.product(BITS, BITS), SHAPES.items())
    )
    for dtype in [(FP32, BF16, FP16)[number % 3]]
]


@pytest.mark.parametrize(("key_bits", "value_bits", "shape", "dtype"), COMBINATIONS)
def test_codes_are_the_references_to_the_bit(
    key_bits: int, value_bits: int, shape: tuple, dtype: torch.dtype
) -> None:
    widths, kept, slots, groups = shape
    layout = packing.layout_of(key_bits, value_bits, widths, kept, dtype, slots, groups)
    part = packing.make_part(layout, [2, 1], dtype, holes=False)
    given = ops.pack(part.key_PSD, part.value_PSE, *part.channels, list(layout))
    assert given.shape == (len(part.key_PSD), layout.page_bytes)
    assert torch.equal(given, part.tensors[0])
    unpack = ops.implementation("unpack", "reference")
    like = torch.empty(0, dtype=dtype)
    wanted = unpack(given, *part.channels, list(layout), like)
    for x, y in zip(ops.unpack(given, *part.channels, list(layout), like), wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1.6e-2 if dtype == BF16 else 2e-3, atol=1e-6)
    if key_bits == 16:
        chosen = torch.zeros(part.key_PSD.shape, dtype=torch.bool)
        chosen.scatter_(2, part.channels[0].long()[:, None].expand(-1, slots, -1), True)
        assert torch.equal(wanted[0], part.key_PSD.masked_fill(~chosen, 0))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(("key_bits", "value_bits", "shape", "dtype"), COMBINATIONS)
def test_decode_rows_equals_the_unpacked_equivalent(
    key_bits: int, value_bits: int, shape: tuple, dtype: torch.dtype, group: int
) -> None:
    widths, kept, slots, groups = shape
    batch, heads, page = 2, 2, 16
    layouts = [packing.layout_of(key_bits, value_bits, widths, kept, dtype, slots, groups)]
    parts = [packing.make_part(layouts[0], [3, 0, 1, 5], dtype, holes=group % 2 == 0)]
    if group == 3:  # rows that a guard keeps wide stand in a part of their own
        layouts.append(packing.layout_of(8, 8, widths, kept, dtype, slots, groups))
        parts.append(packing.make_part(layouts[1], [0, 2, 0, 1], dtype, holes=False))
    queries = 1 + group % 2
    pages = 5 * batch * heads
    key = torch.randn(pages, widths[0], page).to(dtype)
    value = torch.randn(pages, page, widths[1]).to(dtype)
    table = torch.randperm(pages).view(-1, 5).int()
    counts = torch.tensor([3, 17, 70, 40])
    query = torch.randn(batch, heads * group, queries, widths[0])
    softcap = 5.0 if group == 4 else 0.0
    old = Old([x for part in parts for x in part.tensors], [x for sizes in layouts for x in sizes])
    logits = Logits(widths[0] ** -0.5, softcap)
    operands = (query, Pages(key, value, table, counts), logits, True, old)
    given = ops.decode_rows(*operands)
    wanted = ops.implementation("decode_rows", "reference")(*operands)
    largest = (1.0, 1.0, 1.0)
    if widths[1]:
        largest = (float(value.abs().max()), float(wanted[1].abs().max()), 1.0)
    quantised = min(key_bits, value_bits) < 16 or len(layouts) > 1
    allowed = 2**-12 if quantised else 2e-6  # see csrc/decode_rows/README.md
    for one, other, size in zip(given, wanted, largest, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= allowed * max(1.0, size)
    total = given[2].sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-6)


def test_rows_without_recent_slots_and_rows_without_any() -> None:
    layout = packing.layout_of(4, 4, (64, 64), (64, 64), FP32)
    part = packing.make_part(layout, [2, 0], FP32, holes=True)
    part.tensors[5][:] = -1  # all slots of the first row were dropped too
    pool = torch.randn(2, 64, 16), torch.randn(2, 16, 64)
    table, counts = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    query = torch.randn(1, 2, 1, 64)
    old = Old(part.tensors, list(layout))
    out, lse, weights = ops.decode_rows(query, Pages(*pool, table, counts), Logits(0.1), True, old)
    assert (out == 0).all() and (lse == -torch.inf).all() and (weights == 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["reference", "cpu"])
def test_no_pages_are_packed_and_unpacked(kind: str, bits: int) -> None:
    """A part of old slots may hold nothing, where a guard keeps no row wide."""
    layout = packing.layout_of(bits, bits, (64, 48), (39, 48), FP32)
    channels = [torch.empty(0, kept, dtype=torch.int16) for kept in (39, 48)]
    none = [torch.empty(0, 64, width) for width in (64, 48)]
    run = {"cpu": lambda name: getattr(ops, name)}.get(
        kind, lambda name: ops.implementation(name, "reference")
    )
    pages = run("pack")(*none, *channels, list(layout))
    assert pages.shape == (0, layout.page_bytes)
    key, value = run("unpack")(pages, *channels, list(layout), torch.empty(0))
    assert key.shape == (0, 64, 64)
    assert value.shape == (0, 64, 48)


@given(
    bits=st.sampled_from([8, 4, 2]),
    scale=st.floats(-6, 4),
    offset=st.floats(-100, 100),
    seed=st.integers(0, 2**16),
)
def test_quantised_numbers_are_within_half_a_step(
    bits: int, scale: float, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 64, generator=generator) * 10**scale + offset
    x[0] = x[0, 0]  # a group of equal numbers
    code, step, zero = quantise(x, bits)
    step, zero = step.double()[:, None], zero.double()[:, None]
    exact = x.double()
    assert int(code.max()) < 2**bits
    error = (code * step + zero - exact).abs()
    assert bool((error <= step / 2 * (1 + 1e-3) + exact.abs() * 1e-6).all())
    span = exact.amax(1, keepdim=True) - exact.amin(1, keepdim=True)
    ulp = exact.amin(1, keepdim=True).abs() * 2**-10 + 2**-24
    assert bool((step <= (span + ulp) / (2**bits - 1) * (1 + 2**-9) + 2**-23).all())
    assert bool((zero <= exact.amin(1, keepdim=True)).all())


@given(bits=st.sampled_from([8, 4, 2]), pairs=st.integers(1, 9), lines=st.integers(1, 70))
def test_bytes_give_the_codes_back(bits: int, pairs: int, lines: int) -> None:
    code = torch.randint(0, 2**bits, (2, pairs, lines)).to(torch.uint8)
    assert torch.equal(from_bytes(to_bytes(code, bits), pairs, lines, bits), code)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key_bits": 3}, "bits must be"),
        ({"slots": 48}, "multiple of 32"),
        ({"key_kept": 65}, "more channels"),
        ({"value_group": 40}, "groups"),
    ],
)
def test_layouts_that_kernels_cannot_read_are_refused(change: dict, reason: str) -> None:
    layout = packing.layout_of(4, 4, (64, 64), (64, 64), FP32)._replace(**change)
    channels = torch.arange(64).short()[None]
    x = torch.randn(1, 64, 64)
    with pytest.raises(OperatorError, match=reason):
        ops.implementation("pack", "reference")(x, x, channels, channels, list(layout))
    with pytest.raises(RuntimeError):
        ops.pack(x, x, channels, channels, list(layout))


def test_channels_and_pages_that_do_not_exist_are_refused() -> None:
    layout = packing.layout_of(4, 4, (64, 64), (64, 64), FP32)
    part = packing.make_part(layout, [1, 1], FP32, holes=False)
    pool = torch.randn(2, 64, 16), torch.randn(2, 16, 64)
    pages = Pages(*pool, torch.zeros(2, 1, dtype=torch.int32), torch.tensor([1, 1]))
    query = torch.randn(1, 2, 1, 64)
    for index, bad in ((1, 64), (3, 99)):
        tensors = [x.clone() for x in part.tensors]
        tensors[index][0, 0] = bad
        with pytest.raises(RuntimeError, match=r"channel 64|page 99"):
            ops.decode_rows(query, pages, Logits(0.1), False, Old(tensors, list(layout)))
    assert PageLayout._fields[0] == "slots"
