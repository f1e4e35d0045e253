"""Key channels with two codes: what they stand for, and that every operator adds both."""

from __future__ import annotations

import packing
import pytest
import torch

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.formulas import boost
from kvpress.ops import Logits, Old, Pages
from kvpress.store.packing import pack

FP32, BF16 = torch.float32, torch.bfloat16


def test_the_worked_example() -> None:
    """Codes 13, 6, 0, 15 of one channel are 3, 1, 0, 3 and 1, 2, 0, 3."""
    layout = packing.layout_of(2, 2, (1, 1), (2, 1), FP32, 32, (32, 32))
    codes = torch.tensor([13.0, 6, 0, 15]).repeat(8)
    channels = torch.zeros(1, 2, dtype=torch.int16)
    made = boost.halves((0.5 * codes - 2)[None, :, None], channels, layout)[0]
    assert made[:4, 0].tolist() == pytest.approx(
        [4.0, 0.0, -2.0, 4.0], abs=1e-5
    )  # 0.5 · 4 · hi − 2
    assert made[:4, 1].tolist() == [0.5, 1.0, 0.0, 1.5]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_boosted_channels_are_off_by_half_a_step_of_twice_the_bits(
    bits: int, dtype: torch.dtype
) -> None:
    layout = packing.layout_of(bits, 4, (64, 64), (72, 64), dtype, 64, (32, 64))
    part = packing.make_part(layout, [2, 1], dtype, holes=False)
    like = torch.empty(0, dtype=FP32)
    sizes = layout._replace(item_bytes=4)
    found, values = ops.unpack(part.tensors[0], *part.channels, list(sizes), like)
    wanted = ops.implementation("unpack", "reference")
    expected = wanted(part.tensors[0], *part.channels, list(sizes), like)
    for x, y in zip((found, values), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    keys = part.key_PSD.float()
    grouped = keys.view(len(keys), -1, 32, 64)
    range_PSD = (grouped.amax(2) - grouped.amin(2)).repeat_interleave(32, 1)
    boosted = torch.zeros(len(keys), 64, dtype=torch.bool)
    boosted.scatter_(1, part.channels[0][:, 64:].long(), True)
    levels = torch.where(boosted[:, None], 2 ** (2 * bits) - 1, 2**bits - 1)
    # Steps and zeros are fp16: that is all that 16 bits can be off by.
    allowed = 0.5 * range_PSD / levels + 2**-9 * keys.abs().amax()
    assert bool(((found - keys).abs() <= allowed).all())
    if bits == 2:
        plain = 0.5 * range_PSD / 3
        assert float((found - keys).abs()[boosted[:, None].expand_as(keys)].mean()) < 0.15 * float(
            plain.mean()
        )


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_what_fp16_steps_leave_over_is_in_the_low_codes(offset: float) -> None:
    keys = torch.randn(4, 64, 64) + offset
    layout = packing.layout_of(4, 4, (64, 64), (72, 64), FP32, 64, (32, 64))
    channels = packing.subsets(1, 72, 64).expand(4, -1), packing.subsets(1, 64, 64).expand(4, -1)
    channels = channels[0].contiguous(), channels[1].contiguous()
    found, _ = ops.unpack(pack(layout, keys, keys, channels), *channels, list(layout), keys[:0])
    boosted = channels[0][0, 64:].long()
    error = (found - keys)[..., boosted]
    step = 6 / 255
    assert float(error.square().mean().sqrt()) < 0.4 * step and float(error.mean().abs()) < 2e-3


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize(
    ("bits", "widths", "more"),
    [((2, 2), (64, 64), 8), ((2, 4), (80, 80), 20), ((4, 2), (128, 96), 7), ((8, 8), (40, 40), 40)],
    ids=str,
)
def test_decoding_adds_both_codes(
    bits: tuple[int, int], widths: tuple[int, int], more: int, group: int, dtype: torch.dtype
) -> None:
    kept = (widths[0] + more, widths[1])
    layouts = [packing.layout_of(*bits, widths, kept, dtype, 64, (32, 32))]
    parts = [packing.make_part(layouts[0], [3, 0, 1, 5], dtype, holes=group > 1)]
    layouts.append(packing.layout_of(8, 8, widths, kept, dtype, 64, (64, 64)))
    parts.append(packing.make_part(layouts[1], [0, 2, 0, 1], dtype, holes=False))
    pool = torch.randn(20, widths[0], 16).to(dtype), torch.randn(20, 16, widths[1]).to(dtype)
    table, counts = torch.randperm(20).view(4, 5).int(), torch.tensor([3, 17, 70, 40])
    query = torch.randn(2, 2 * group, 1 + group % 2, widths[0])
    old = Old([x for part in parts for x in part.tensors], [x for one in layouts for x in one])
    operands = (query, Pages(*pool, table, counts), Logits(widths[0] ** -0.5), True, old)
    for name in ("decode_rows", "attend_parts"):
        given = getattr(ops, name)(*operands)
        wanted = ops.implementation(name, "reference")(*operands)
        for one, other in zip(given, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_what_no_operator_can_mean_is_refused() -> None:
    layout = packing.layout_of(2, 2, (64, 64), (72, 64), FP32)
    part = packing.make_part(layout, [1], FP32, holes=False)
    like = torch.empty(0)
    for kind in ("cpu", "reference"):
        run = {
            name: getattr(ops, name) if kind == "cpu" else ops.implementation(name, kind)
            for name in ("pack", "unpack", "page_bounds")
        }
        with pytest.raises(OperatorError, match="channels of their own"):
            run["pack"](part.key_PSD, part.value_PSE, *part.channels, list(layout))
        with pytest.raises(OperatorError, match="no bounds"):
            run["page_bounds"](part.tensors[0], *part.channels, list(layout), like, 0)
        for place in (70, 3):  # of either run
            wrong = part.channels[0].clone()
            wrong[:, place] = wrong[:, place - 1]
            with pytest.raises(OperatorError, match="ascend"):
                run["unpack"](part.tensors[0], wrong, part.channels[1], list(layout), like)
        with pytest.raises(OperatorError, match=r"more channels"):
            run["unpack"](
                part.tensors[0], *part.channels, list(layout._replace(key_kept=129)), like
            )
    assert pack(layout, part.key_PSD, part.value_PSE, part.channels).equal(part.tensors[0])
