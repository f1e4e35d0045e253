"""Attention over parts, joined: exact formulas, order, and parts that saw nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpress import ops
from kvpress.errors import OperatorError

NAN, INF = float("nan"), float("inf")
BACKENDS = pytest.mark.parametrize("backend", ["operator", "reference"])


def join(backend: str, out_JBNQE: Tensor, lse_JBNQ: Tensor) -> tuple[Tensor, Tensor]:
    run = ops.implementation("join_parts", "reference")
    return (ops.join_parts if backend == "operator" else run)(out_JBNQE, lse_JBNQ)


def parts_of(*shape: int) -> tuple[Tensor, Tensor]:
    """Outputs of parts and their LSEs, some of which saw nothing and hold NaN."""
    out_JBNQE, lse_JBNQ = torch.randn(shape), torch.randn(shape[:-1]) * 9
    nothing_JBNQ = torch.rand(shape[:-1]) < 0.2
    nothing_JBNQ[0] = False
    lse_JBNQ[nothing_JBNQ], out_JBNQE[nothing_JBNQ] = -INF, NAN
    return out_JBNQE, lse_JBNQ


@BACKENDS
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (2, 1, 3, 1, 64), (7, 2, 5, 3, 21), (64, 4, 9, 1, 64), (5, 1, 2, 300, 256)],
    ids=str,
)
def test_parts_together_are_the_formula_in_64_bits(shape: tuple[int, ...], backend: str) -> None:
    out, lse = parts_of(*shape)
    wanted_lse = lse.double().logsumexp(0)
    share = (lse.double() - wanted_lse).exp()[..., None]
    wanted = (share * out.double().nan_to_num()).sum(0)
    joined, joined_lse = join(backend, out, lse)
    assert joined.dtype == joined_lse.dtype == torch.float32
    torch.testing.assert_close(joined.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined_lse.double(), wanted_lse, rtol=1e-6, atol=1e-6)


@BACKENDS
def test_attention_in_parts_is_attention(backend: str) -> None:
    query, key, value = (torch.randn(2, 3, n, 32) for n in (4, 200, 200))
    logits = query @ key.transpose(2, 3)
    wanted = logits.softmax(-1) @ value
    given = [
        (x.softmax(-1) @ v, x.logsumexp(-1))
        for x, v in zip(logits.split(37, 3), value.split(37, 2), strict=True)
    ]
    out, lse = join(backend, *(torch.stack(x) for x in zip(*given, strict=True)))
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_the_bits_depend_neither_on_threads_nor_on_the_batch() -> None:
    out, lse = parts_of(40, 5, 9, 3, 61)
    torch.set_num_threads(1)
    whole = ops.join_parts(out, lse)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for given, wanted in zip(ops.join_parts(out, lse), whole, strict=True):
            assert torch.equal(given, wanted)
    for b in range(5):
        for n in range(9):
            row = (slice(None), slice(b, b + 1), slice(n, n + 1), slice(b % 3, b % 3 + 1))
            alone = ops.join_parts(out[row].contiguous(), lse[row].contiguous())
            for given, wanted in zip(alone, whole, strict=True):
                assert torch.equal(given, wanted[row[1:]])


def test_parts_are_added_in_their_order() -> None:
    out, lse = torch.randn(30, 1, 1, 1, 64), torch.zeros(30, 1, 1, 1)
    total = torch.zeros(1, 1, 1, 64)
    for part in out:
        total += part
    joined, joined_lse = ops.join_parts(out, lse)
    assert torch.equal(joined, total / 30)
    torch.testing.assert_close(joined_lse, torch.full((1, 1, 1), 30.0).log())


@BACKENDS
def test_one_part_comes_out_as_it_was(backend: str) -> None:
    out, lse = torch.randn(1, 2, 3, 4, 40), torch.randn(1, 2, 3, 4) * 50
    joined, joined_lse = join(backend, out, lse)
    assert torch.equal(joined, out[0]) and torch.equal(joined_lse, lse[0])


@BACKENDS
@pytest.mark.parametrize("parts", [0, 1, 5])
def test_parts_that_saw_nothing_give_zeros(parts: int, backend: str) -> None:
    out, lse = torch.full((parts, 1, 3, 2, 24), NAN), torch.full((parts, 1, 3, 2), -INF)
    joined, joined_lse = join(backend, out, lse)
    assert torch.equal(joined, torch.zeros(1, 3, 2, 24))
    assert torch.equal(joined_lse, torch.full((1, 3, 2), -INF))


@BACKENDS
def test_parts_far_below_the_largest_add_nothing(backend: str) -> None:
    out, lse = torch.randn(3, 1, 1, 2, 24), torch.tensor([5.0, -82.0, 5.0]).view(3, 1, 1, 1)
    out[1] = NAN
    joined, joined_lse = join(backend, out, lse.expand(3, 1, 1, 2).contiguous())
    wanted, wanted_lse = join(backend, out[::2].contiguous(), torch.full((2, 1, 1, 2), 5.0))
    assert torch.equal(joined, wanted) and torch.equal(joined_lse, wanted_lse)


@BACKENDS
def test_large_sums_do_not_overflow_and_numbers_that_are_none_stay(backend: str) -> None:
    out, lse = torch.randn(3, 1, 4, 1, 16), torch.zeros(3, 1, 4, 1)
    lse[:, 0, 0], lse[:, 0, 1] = 3e4, -3e4
    lse[1, 0, 2], out[1, 0, 3] = NAN, NAN
    joined, joined_lse = join(backend, out, lse)
    torch.testing.assert_close(joined[0, :2], out.mean(0)[0, :2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined_lse[0, :2, 0], torch.tensor([3e4, -3e4]), rtol=1e-4, atol=0)
    assert joined[0, 2:].isnan().all() and joined_lse[0, 2].isnan() and joined_lse[0, 3].isfinite()


@BACKENDS
@pytest.mark.parametrize(
    ("out", "lse", "message"),
    [
        (torch.zeros(2, 1, 3, 1, 8), torch.zeros(3, 1, 3, 1), "J is 2"),
        (torch.zeros(2, 1, 3, 1, 8), torch.zeros(2, 1, 3), "3 dimensions"),
        (torch.zeros(2, 1, 3, 1, 8).half(), torch.zeros(2, 1, 3, 1), "float32"),
        (torch.zeros(2, 1, 3, 1, 8), torch.zeros(2, 1, 3, 1).double(), "float32"),
        (torch.zeros(2, 1, 3, 8, 2).transpose(3, 4), torch.zeros(2, 1, 3, 2), "contiguous"),
        (torch.zeros(2, 1, 3, 1, 641), torch.zeros(2, 1, 3, 1), "at most 640"),
    ],
)
def test_operands_that_do_not_fit(out: Tensor, lse: Tensor, message: str, backend: str) -> None:
    with pytest.raises(OperatorError, match=message):
        join(backend, out, lse)


def test_join_parts_passes_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.kvpress.join_parts.default, (torch.randn(3, 1, 2, 1, 8), torch.randn(3, 1, 2, 1))
    )
