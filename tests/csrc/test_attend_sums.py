"""`attend_sums`: the attention of a prompt and its sums equal those of two passes."""

from __future__ import annotations

from typing import Any

import calls
import pytest
import torch

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.formulas.attention import prompt_attention
from kvpress.ops import Logits, Noise, Reduction

reference = ops.implementation("attend_sums", "reference")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# id: batch, KV heads, group, P, D, E, dtype, softcap, noise, tau
CASES = {
    "P1": (1, 1, 1, 1, 32, 32, FP32, 0.0, "fresh", 1.0),
    "P13-G3": (2, 2, 3, 13, 64, 64, FP32, 0.0, "none", 1.0),
    "P257-G4-fresh": (1, 2, 4, 257, 80, 80, FP32, 0.0, "fresh", 1.0),
    "P300-G1-frozen-tau": (2, 1, 1, 300, 96, 96, FP32, 0.0, "frozen", 1.7),
    "P530-G2-E72-fresh-tau": (1, 2, 2, 530, 64, 72, FP32, 0.0, "fresh", 0.6),
    "P101-G8-softcap": (1, 1, 8, 101, 128, 128, FP32, 5.0, "fresh", 1.0),
    "P270-G3-tau": (1, 2, 3, 270, 64, 64, FP32, 0.0, "none", 1.4),
    "P77-G16-D256-bf16": (1, 1, 16, 77, 256, 256, BF16, 0.0, "fresh", 1.0),
    "P40-G6-D576-E512": (1, 1, 6, 40, 576, 512, FP32, 0.0, "fresh", 1.0),
    "P65-G2-D7-E3-fp16": (1, 2, 2, 65, 7, 3, FP16, 0.0, "frozen", 1.0),
}


def operands(case: tuple[Any, ...]) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    batch, heads, group, prompt, width, value_width, dtype, softcap, noise, tau = case
    shapes = ((heads * group, width), (heads, width), (heads, value_width))
    # As a model hands them over: heads and tokens transposed.
    tensors = [torch.randn(batch, prompt, n, w).to(dtype).transpose(1, 2) for n, w in shapes]
    position = (torch.arange(prompt) * 3 + 5).repeat(batch, heads, 1)
    return [*tensors, position], (Logits(width**-0.5, softcap), Noise(noise, tau, (9 << 33) + 4, 6))


def exact_attention(query: Any, key: Any, value: Any, scaling: float, cap: float) -> torch.Tensor:
    group, prompt = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    x = query.double() @ key.mT * scaling
    x = torch.tanh(x / cap) * cap if cap else x
    future = torch.ones(prompt, prompt, dtype=torch.bool).triu(1)
    return x.masked_fill(future, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_and_sums_equal_those_of_two_passes(case: tuple[Any, ...]) -> None:
    (query, key, value, position), numbers = operands(case)
    out, sums = ops.attend_sums(query, key, value, position, *numbers)
    logits, noise = numbers
    exact = exact_attention(query, key, value, *logits)
    plain = prompt_attention(query, key, value, None, *logits).double()
    allowed = 2 * (plain - exact).abs().max() + 2e-6 * exact.abs().max()
    assert out.dtype == query.dtype and (out.double() - exact).abs().max() <= allowed
    prompt = query.shape[2]
    wanted = ops.implementation("attention_sums", "reference")(
        query, key, position, logits, Reduction(prompt), noise
    )
    torch.testing.assert_close(sums, wanted, rtol=2e-5, atol=1e-5)
    total = torch.full(sums.shape[:2], float(prompt))
    torch.testing.assert_close(sums.sum(-1), total, rtol=1e-5, atol=0)


def test_a_row_does_not_depend_on_its_batch_or_the_threads() -> None:
    (query, key, value, position), numbers = operands(
        (2, 2, 2, 400, 32, 32, FP32, 0.0, "fresh", 1.0)
    )
    together = ops.attend_sums(query, key, value, position, *numbers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = ops.attend_sums(query[1:], key[1:], value[1:], position[1:], *numbers)
    torch.set_num_threads(threads)
    assert all(torch.equal(a[0], t[1]) for a, t in zip(alone, together, strict=True))


def test_the_reference_and_opcheck() -> None:
    tensors, numbers = operands(CASES["P13-G3"])
    for given, wanted in zip(
        ops.attend_sums(*tensors, *numbers), reference(*tensors, *numbers), strict=True
    ):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)
    args = calls.flat("attend_sums", *tensors, *numbers)
    torch.library.opcheck(torch.ops.kvpress.attend_sums.default, args)


@pytest.mark.parametrize("native", [True, False])
def test_bad_operands_are_refused_by_name(native: bool) -> None:
    run = ops.attend_sums if native else reference
    (query, key, value, position), numbers = operands(CASES["P13-G3"])
    refused: list[tuple[tuple[Any, ...], str]] = [
        ((query[:, :, 1:], key, value, position), "12 queries for 13 slots"),
        ((query, key, value[:, :1], position), "but H is 2"),
        ((query, key, value, position.int()), "int64"),
        ((query, key, value.int(), position), "float32, bfloat16 or float16|of the dtype"),
        ((query, key.half(), value, position), "of the dtype|must be torch.float32"),
        ((query[:, :5], key, value, position), "no multiple"),
        ((query, key, torch.randn(2, 2, 13, 648), position), "at most 640"),
    ]
    for tensors, message in refused:
        with pytest.raises((OperatorError, RuntimeError), match=message):
            run(*tensors, *numbers)
    with pytest.raises((OperatorError, RuntimeError), match="tau"):
        run(query, key, value, position, Logits(0.1), Noise("none", 0.0, 0, 0))
