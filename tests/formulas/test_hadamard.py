"""Channels turned by a Hadamard matrix: the worked example, blocks, and what stays."""

from __future__ import annotations

import pytest
import torch

from kvpress.formulas.hadamard import block, turned

KEY, QUERY = torch.tensor([8.0, 0, 1, -1]), torch.tensor([0.1, 1, -1, 0.5])


def coded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of one step for all channels, and back."""
    step = (x.max() - x.min()) / (2**bits - 1)
    return ((x - x.min()) / step).round() * step + x.min()


def test_the_worked_example() -> None:
    assert turned(KEY).tolist() == [4, 5, 4, 3]
    assert float(QUERY @ KEY) == pytest.approx(-0.7)
    assert float(turned(QUERY) @ turned(KEY)) == pytest.approx(-0.7, abs=1e-6)
    for bits, plain in ((4, -0.300), (2, -2.700)):
        assert float(QUERY @ coded(KEY, bits)) == pytest.approx(plain, abs=1e-3)
    # Two of the four lie between two codes: whichever they get, the product is at most so far off.
    for bits, most in ((4, 0.074), (2, 0.37)):
        assert abs(float(turned(QUERY) @ coded(turned(KEY), bits)) + 0.7) < most


@pytest.mark.parametrize(
    "width, size", [(64, 64), (96, 32), (80, 16), (112, 16), (192, 64), (576, 64), (10, 2)]
)
def test_blocks_are_the_largest_powers_of_two_and_turn_back(width: int, size: int) -> None:
    assert block(width) == size
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(width))
    made = turned(x)
    torch.testing.assert_close(turned(made), x, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(made.norm(dim=-1), x.norm(dim=-1))
    unit = torch.zeros(width)
    unit[0] = 1.0
    assert turned(unit).nonzero().flatten().tolist() == list(range(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_stays_in_its_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert turned(x).dtype == dtype
    torch.testing.assert_close(turned(turned(x)).float(), x.float(), atol=0.05, rtol=0.05)
