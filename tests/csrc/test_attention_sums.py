"""`attention_sums`: windows, soft-capping and empty slots. Noise is tested with its policy."""

from __future__ import annotations

import pytest
import torch

from kvpress import ops
from kvpress.ops import Logits, Noise


def dense(
    query: torch.Tensor, key: torch.Tensor, position: torch.Tensor, cap: float, window: int
) -> torch.Tensor:
    _, heads, slots, _ = key.shape
    new = query.shape[2]
    x = (
        torch.einsum("bhgqd,bhkd->bhgqk", query.unflatten(1, (heads, -1)).double(), key.double())
        * 0.3
    )
    x = torch.tanh(x / cap) * cap if cap else x
    future = torch.arange(slots) > torch.arange(slots - new, slots)[:, None]
    x = x.masked_fill(future, -torch.inf).masked_fill((position < 0)[:, :, None, None], -torch.inf)
    return x.softmax(-1)[..., -window:, :].sum(3).flatten(1, 2).float()


@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("window", [1, 7, 19, 100])
@pytest.mark.parametrize(("new", "old"), [(19, 0), (19, 12), (1, 5)])
def test_equals_the_dense_sum(new: int, old: int, window: int, cap: float) -> None:
    query, key = torch.randn(2, 6, new, 8), torch.randn(2, 2, old + new, 8)
    position = torch.arange(old + new).repeat(2, 2, 1)
    position[1, 0, : old // 2] = -1  # a row that evicted more than the others
    given = ops.attention_sums(
        query, key, position, Logits(0.3, cap), window, Noise("none", 1.0, 0, 0)
    )
    torch.testing.assert_close(
        given, dense(query, key, position, cap, window), rtol=1e-4, atol=1e-6
    )
    assert (given[(position < 0).repeat_interleave(3, 1)] == 0).all()
    torch.testing.assert_close(given.sum(-1), torch.full((2, 6), float(min(window, new))))


def test_sums_of_a_half_precision_model_are_fp32() -> None:
    query, key = torch.randn(1, 2, 9, 8).bfloat16(), torch.randn(1, 2, 9, 8).bfloat16()
    position = torch.arange(9).expand(1, 2, 9)
    given = ops.attention_sums(query, key, position, Logits(0.3), 9, Noise("fresh", 1.0, 0, 0))
    assert given.dtype == torch.float32
    torch.testing.assert_close(given.sum(-1), torch.full((1, 2), 9.0))


def test_half_precision_states_are_multiplied_in_fp32() -> None:
    query, key = torch.randn(1, 2, 64, 64).bfloat16() * 4, torch.randn(1, 2, 64, 64).bfloat16()
    position = torch.arange(64).expand(1, 2, 64)
    choices = (position, Logits(0.3), 64, Noise("none", 1.0, 0, 0))
    given = ops.attention_sums(query, key, *choices)
    exact = ops.attention_sums(query.float(), key.float(), *choices)
    assert torch.equal(given, exact)
