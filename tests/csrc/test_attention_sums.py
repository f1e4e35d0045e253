"""`attention_sums`: windows, soft-capping, empty slots, maxima. Noise is tested with its policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.ops import Logits, Noise, Reduction

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
reference = ops.implementation("attention_sums", "reference")


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    position: torch.Tensor,
    cap: float,
    reduction: Reduction,
) -> torch.Tensor:
    window, largest, weight = reduction
    _, heads, slots, _ = key.shape
    new = query.shape[2]
    x = (
        torch.einsum("bhgqd,bhkd->bhgqk", query.unflatten(1, (heads, -1)).double(), key.double())
        * 0.3
    )
    x = torch.tanh(x / cap) * cap if cap else x
    future = torch.arange(slots) > torch.arange(slots - new, slots)[:, None]
    x = x.masked_fill(future, -torch.inf).masked_fill((position < 0)[:, :, None, None], -torch.inf)
    w = x.softmax(-1).nan_to_num()
    w = w if weight is None else w * weight[:, None, None, :, None]
    w = w[..., max(0, new - window) :, :]
    return (w.amax(3) if largest else w.sum(3)).flatten(1, 2).float()


@pytest.mark.parametrize("cap", [0.0, 4.0])
@pytest.mark.parametrize("window", [1, 7, 19, 100])
@pytest.mark.parametrize(("new", "old"), [(19, 0), (19, 12), (1, 5)])
def test_equals_the_dense_sum(new: int, old: int, window: int, cap: float) -> None:
    query, key = torch.randn(2, 6, new, 8), torch.randn(2, 2, old + new, 8)
    position = torch.arange(old + new).repeat(2, 2, 1)
    position[1, 0, : old // 2] = -1  # a row that evicted more than the others
    given = ops.attention_sums(
        query, key, position, Logits(0.3, cap), Reduction(window), Noise("none", 1.0, 0, 0)
    )
    torch.testing.assert_close(
        given, dense(query, key, position, cap, Reduction(window)), rtol=1e-4, atol=1e-6
    )
    assert (given[(position < 0).repeat_interleave(3, 1)] == 0).all()
    torch.testing.assert_close(given.sum(-1), torch.full((2, 6), float(min(window, new))))


def test_sums_of_a_half_precision_model_are_fp32() -> None:
    query, key = torch.randn(1, 2, 9, 8).bfloat16(), torch.randn(1, 2, 9, 8).bfloat16()
    position = torch.arange(9).expand(1, 2, 9)
    given = ops.attention_sums(
        query, key, position, Logits(0.3), Reduction(9), Noise("fresh", 1.0, 0, 0)
    )
    assert given.dtype == torch.float32
    torch.testing.assert_close(given.sum(-1), torch.full((1, 2), 9.0))


def test_half_precision_states_are_multiplied_in_fp32() -> None:
    query, key = torch.randn(1, 2, 64, 64).bfloat16() * 4, torch.randn(1, 2, 64, 64).bfloat16()
    position = torch.arange(64).expand(1, 2, 64)
    choices = (position, Logits(0.3), Reduction(64), Noise("none", 1.0, 0, 0))
    given = ops.attention_sums(query, key, *choices)
    exact = ops.attention_sums(query.float(), key.float(), *choices)
    assert torch.equal(given, exact)


# id: B, H, G, Q, S, D, query dtype, key dtype, softcap, window
LARGEST = {
    "one": (1, 1, 1, 1, 1, 8, FP32, FP32, 0.0, 1),
    "G3-chunk-softcap": (2, 2, 3, 19, 31, 40, FP32, FP32, 4.0, 100),
    "G1-window": (2, 3, 1, 37, 67, 16, FP32, FP32, 0.0, 7),
    "G4-blocks": (1, 2, 4, 300, 563, 16, FP32, FP32, 0.0, 300),
    "G2-bf16": (2, 2, 2, 70, 140, 64, BF16, BF16, 0.0, 70),
    "G8-fp16-and-fp32": (1, 1, 8, 33, 33, 32, FP16, FP32, 0.0, 20),
}


def operands(case: tuple[Any, ...], weighted: bool) -> tuple[tuple[torch.Tensor, ...], Reduction]:
    batch, heads, group, new, slots, width, dtype, key_dtype, _, window = case
    query = torch.randn(batch, new, heads * group, width).to(dtype).transpose(1, 2)
    key = torch.randn(batch, heads, slots, width).to(key_dtype)
    position = torch.arange(slots).repeat(batch, heads, 1)
    position[-1, 0, : (slots - new) // 2] = -1  # padding, or a row that evicted more than others
    weight = torch.rand(batch, new) * 5 if weighted else None
    return (query, key, position), Reduction(window, True, weight)


@pytest.mark.parametrize("backend", ["operator", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", LARGEST.values(), ids=LARGEST)
def test_the_largest_equals_the_dense_maximum(
    case: tuple[Any, ...], weighted: bool, backend: str
) -> None:
    tensors, reduction = operands(case, weighted)
    run = ops.attention_sums if backend == "operator" else reference
    cap = case[8]
    given = run(*tensors, Logits(0.3, cap), reduction, Noise("none", 1.0, 0, 0))
    torch.testing.assert_close(given, dense(*tensors, cap, reduction), rtol=1e-5, atol=1e-5)
    assert (given[(tensors[2] < 0).repeat_interleave(case[2], 1)] == 0).all()


@pytest.mark.parametrize("noise", [("none", 1.0), ("none", 0.7), ("frozen", 1.0), ("fresh", 1.0)])
def test_weights_of_queries_multiply_the_terms_of_sums(noise: Any) -> None:
    tensors, reduction = operands(LARGEST["G3-chunk-softcap"], True)
    query, *rest, draw = *tensors, Noise(*noise, 5, 1)
    given = ops.attention_sums(query, *rest, Logits(0.3), Reduction(9, False, reduction[2]), draw)
    wanted = torch.zeros_like(given)
    for q in range(10, 19):  # one query after the other, each as the last one of a prompt
        slots = 12 + q + 1
        seen = query[:, :, q : q + 1], *(x[:, :, :slots] for x in rest)
        part = ops.attention_sums(*seen, Logits(0.3), Reduction(1), draw)
        wanted[..., :slots] += part * reduction[2][:, q, None, None]
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)
    plain = reference(query, *rest, Logits(0.3), Reduction(9, False, reduction[2]), draw)
    torch.testing.assert_close(plain, wanted, rtol=1e-4, atol=1e-6)


def test_the_largest_does_not_depend_on_batch_or_threads() -> None:
    tensors, reduction = operands(LARGEST["G4-blocks"], True)
    pair = [torch.cat([x, x.flip(2) if x.dim() == 4 else x]) for x in tensors]
    weight = torch.cat([reduction[2], reduction[2] + 1])
    choices = Logits(0.3), Noise("none", 1.0, 0, 0)
    together = ops.attention_sums(*pair, choices[0], Reduction(300, True, weight), choices[1])
    threads = torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        alone = ops.attention_sums(*tensors, choices[0], reduction, choices[1])
        assert torch.equal(alone[0], together[0])
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["operator", "reference"])
def test_the_largest_of_what_is_no_number_is_none(backend: str) -> None:
    query, key = torch.randn(1, 1, 40, 8), torch.randn(1, 1, 40, 8)
    key[0, 0, 30] = torch.nan
    run = ops.attention_sums if backend == "operator" else reference
    choices = Logits(0.3), Reduction(40, True), Noise("none", 1.0, 0, 0)
    assert bool(run(query, key, torch.arange(40)[None, None], *choices)[0, 0, :31].isnan().all())


@pytest.mark.parametrize("backend", ["operator", "reference"])
def test_reductions_that_cannot_be_are_refused(backend: str) -> None:
    tensors, (window, _, weight) = operands(LARGEST["G1-window"], True)
    run = ops.attention_sums if backend == "operator" else reference
    plain = Noise("none", 1.0, 0, 0)
    odd = weight.clone()
    odd[1, 3] = -0.5
    for reduction, noise, message in (
        (Reduction(window, True), Noise("fresh", 1.0, 0, 0), "those without noise"),
        (Reduction(window, True), Noise("none", 0.5, 0, 0), "those without noise"),
        (Reduction(-1, True), plain, "window is -1"),
        (Reduction(window, True, weight[:, 1:]), plain, "Q is 37"),
        (Reduction(window, True, weight.double()), plain, "float32"),
        (Reduction(window, False, odd), plain, "weight_BQ holds"),
        (Reduction(window, False, odd / 0), plain, "weight_BQ holds"),
    ):
        with pytest.raises(OperatorError, match=message):
            run(*tensors, Logits(0.3), reduction, noise)
