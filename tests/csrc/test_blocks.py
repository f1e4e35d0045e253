"""`estimate_blocks` and `attend_blocks`: the properties of SALE (S1 to S10)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from blocking import estimate_operands, operands

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.formulas.attention import prompt_attention
from kvpress.formulas.block_map import (
    QUERIES,
    SLOTS,
    Blocks,
    computed_blocks,
    from_map,
    of_slots,
    to_map,
)
from kvpress.formulas.codes import _codes, quantise_keys, quantise_queries
from kvpress.ops import Logits, Noise, Reduction
from kvpress.pipe.stages import sparsify

attend_reference, estimate_reference, sums_reference = (
    ops.implementation(name, "reference")
    for name in ("attend_blocks", "estimate_blocks", "attention_sums")
)
SHAPES = {  # B, N, H, P, S, D
    "P1-S1": (1, 2, 1, 1, 1, 64),
    "P63-S63": (1, 2, 2, 63, 63, 64),
    "P300-S300-G2-D16": (2, 4, 2, 300, 300, 16),
    "P130-S700-G3-D80": (2, 6, 2, 130, 700, 80),
    "P1024-S1024-D128": (1, 2, 2, 1024, 1024, 128),
    "P1025-S1025-D96": (1, 4, 4, 1025, 1025, 96),
    "P257-S1500-G2-D256": (1, 2, 1, 257, 1500, 256),
    "P70-S1925-G3-D7": (1, 3, 1, 70, 1925, 7),
}
CASES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def a_map(query: torch.Tensor, key: torch.Tensor, tau: float, local: int = 128) -> torch.Tensor:
    """Which blocks are computed, bool `[B, N, I, J]`."""
    tau_N = torch.full((query.shape[1],), tau)
    bits = sparsify.block_map(query, key, query.shape[-1] ** -0.5, tau_N, local)
    return from_map(bits, Blocks(query.shape[2], key.shape[2]))


def test_the_local_area() -> None:
    blocks = Blocks(8 * QUERIES, 8 * QUERIES)
    found = []
    for row in range(blocks.rows):
        first = blocks.first_local(row, 128)
        found.append((blocks.end(row), max(0, first - 1) // 4, first))
    assert found[:4] == [(2, 0, 0), (4, 0, 0), (6, 0, 0), (8, 0, 0)]
    assert found[4:] == [(10, 1, 5), (12, 1, 5), (14, 2, 9), (16, 2, 9)]


@pytest.mark.parametrize("local", [0, 1, 31, 32, 33, 100, 128, 256, 2**63 - 1])
@pytest.mark.parametrize("sizes", [(1, 1), (64, 64), (100, 1000), (1025, 1025), (700, 3000)])
def test_blocks_are_first_examined_or_local(sizes: tuple[int, int], local: int) -> None:
    blocks = Blocks(*sizes)
    always = blocks.always(local)
    for row in range(blocks.rows):
        end, first = blocks.end(row), blocks.first_local(row, local)
        last_slot = sizes[1] - sizes[0] + min((row + 1) * QUERIES, sizes[0]) - 1
        assert end == last_slot // SLOTS + 1 or end == blocks.columns
        assert first == 0 or (first % 4 == 1 and (end - first) * SLOTS >= max(local, 1))
        examined = range(1, first)
        assert always[row].tolist() == [
            j < end and j not in examined for j in range(blocks.columns)
        ]


@pytest.mark.parametrize("sizes", [(1, 1), (65, 65), (100, 1000), (1025, 1025)])
def test_a_map_is_one_bit_per_block(sizes: tuple[int, int]) -> None:
    blocks = Blocks(*sizes)
    computed = (torch.rand(2, 3, blocks.rows, blocks.columns) < 0.4) & blocks.seen()
    bits = to_map(computed, blocks)
    assert torch.equal(from_map(bits, blocks), computed)
    assert torch.equal(computed_blocks(bits), computed.sum((2, 3)))
    assert blocks.causal / 8 <= bits.shape[-1] <= blocks.causal / 8 + blocks.rows


def test_the_worked_example_quantises() -> None:
    query = torch.tensor([0.7, -1.4, 0.35, 2.1])
    keys = torch.tensor([[1.05, -0.6, 0.2, 0.94], [-0.48, 0.32, 1.4, -1.0]])
    code = _codes(query, query.abs().max() / 7)
    assert code.tolist() == [2, -5, 1, 7]
    codes = _codes(keys, keys.abs().max() / 7)
    assert codes.tolist() == [[5, -3, 1, 5], [-2, 2, 7, -5]]
    dots = codes.int() @ code.int()
    assert dots.tolist() == [61, -42]
    torch.testing.assert_close(0.5 * 0.3 * 0.2 * dots.float(), torch.tensor([1.83, -1.26]))
    assert _codes(torch.tensor([2.5, 3.5, -2.5]), torch.tensor(1.0)).tolist() == [2, 4, -2]


@pytest.mark.parametrize("kind", ["operator", "reference"])
@pytest.mark.parametrize(
    "tau, blocks", [(0.02, [2, 3]), (0.025, [2]), (0.5, [2]), (0.54, []), (0.0, [1, 2, 3, 4])]
)
def test_the_worked_example_decides(tau: float, blocks: list[int], kind: str) -> None:
    run = ops.estimate_blocks if kind == "operator" else estimate_reference
    query = torch.tensor([2, -5, 1, 7], dtype=torch.int8).view(1, 1, 1, 4)
    key = torch.zeros(1, 1, 320, 4, dtype=torch.int8)
    key[..., 1:5, :].fill_(0)
    key[..., SLOTS : 5 * SLOTS, :] = torch.tensor([-7, 7, -7, -7], dtype=torch.int8)
    key[0, 0, 2 * SLOTS + 9] = torch.tensor([5, -3, 1, 5], dtype=torch.int8)
    key[0, 0, 3 * SLOTS + 30] = torch.tensor([-2, 2, 7, -5], dtype=torch.int8)
    lse = torch.tensor([2.0, 1.0, 0.5]).logsumexp(0)
    bound = ((lse + torch.tensor(tau).log()) / 0.5).view(1, 1, 1)
    if tau == 0.5:
        torch.testing.assert_close(bound.item(), 3.542443, rtol=0, atol=1e-5)
    scales = torch.full((1, 1, 1), 0.3), torch.full((1, 1, 10, 4), 0.2)
    bits = run(query, scales[0], key, scales[1], torch.zeros(1, 1, 320), bound, 128)
    computed = from_map(bits, Blocks(1, 320))[0, 0, 0]
    assert computed.nonzero().flatten().tolist() == [0, *blocks, 5, 6, 7, 8, 9]


@CASES
@pytest.mark.parametrize("tau", [0.0, 0.002, 0.05, 1.0, float("inf")])
def test_maps_equal_the_reference_bit_for_bit(shape: tuple[int, ...], tau: float) -> None:
    query, key, _ = operands(*shape)
    given = estimate_operands(query, key, tau)
    bits = ops.estimate_blocks(*given)
    assert torch.equal(bits, estimate_reference(*given))


@pytest.mark.parametrize("local", [0, 1, 31, 32, 33, 2**63 - 1])
@pytest.mark.parametrize("slots", [129, 140, 161, 222])
def test_a_last_block_that_is_not_whole_is_never_examined(slots: int, local: int) -> None:
    query, key, _ = operands(1, 2, 1, slots, slots, 16)
    *given, _ = estimate_operands(query, key, 0.01)
    bits = ops.estimate_blocks(*given, local)
    assert torch.equal(bits, estimate_reference(*given, local))
    blocks = Blocks(slots, slots)
    assert from_map(bits, blocks)[:, :, -1, blocks.columns - 1].all()


@pytest.mark.parametrize("kind", ["operator", "reference"])
def test_a_threshold_of_minus_infinity_computes_everything(kind: str) -> None:
    run = ops.estimate_blocks if kind == "operator" else estimate_reference
    query, key, _ = operands(1, 2, 1, 300, 900, 16)
    given = [
        x.zero_() if i in (0, 2) else x for i, x in enumerate(estimate_operands(query, key, 1))
    ]
    given[4].fill_(-1e38)  # estimates saturate at their lowest
    given[5].fill_(torch.inf)
    blocks = Blocks(300, 900)
    nothing_more = blocks.always(128).expand(1, 2, -1, -1)
    assert torch.equal(from_map(run(*given), blocks), nothing_more)
    given[5][:, 0, 5::QUERIES] = -torch.inf  # one query of every block
    computed = from_map(run(*given), blocks)
    assert torch.equal(computed[:, 0], blocks.seen()[None])
    assert torch.equal(computed[:, 1], nothing_more[:, 1])


@pytest.mark.parametrize("most", [20.0, 4e4, 1e38])
def test_maps_are_exact_where_estimates_are_next_to_their_bounds(most: float) -> None:
    query, key, _ = operands(1, 6, 2, 160, 700, 24)
    given = [
        x.clone() if isinstance(x, torch.Tensor) else x for x in estimate_operands(query, key, 1)
    ]
    for scale in given[1], given[3]:
        scale.fill_(1)
    given[4].uniform_(-most, 20).mul_(2).round_().div_(2)  # halves too
    dot_BHGQS = given[0].float().unflatten(1, (2, -1)) @ given[2].float()[:, :, None].mT
    moved_BNQS = given[4].round().clamp(-32768, 32767)[:, :, None] + dot_BHGQS.flatten(1, 2)
    highest_BNQ = moved_BNQS[..., SLOTS:448].clamp(-32768, 32767).amax(-1)
    computed = []
    for under in (0.0, 0.5, 1.0, 2.0):
        given[5].copy_(highest_BNQ - under)
        bits = ops.estimate_blocks(*given)
        assert torch.equal(bits, estimate_reference(*given))
        computed.append(int(from_map(bits, Blocks(160, 700)).sum()))
    assert computed == sorted(computed) and computed[0] < computed[-1]


@pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="no C++ compiler here")
@pytest.mark.parametrize("isa", ["avx512vnni", "avx512", "avx2", "portable"])
def test_maps_do_not_depend_on_the_instruction_set(isa: str) -> None:
    code = (
        "import blocking as t, torch; from kvpress import ops\n"
        "reference = ops.implementation('estimate_blocks', 'reference')\n"
        "torch.manual_seed(3); query, key, _ = t.operands(1, 4, 2, 200, 900, 40)\n"
        "given = t.estimate_operands(query, key, 0.02)\n"
        "assert torch.equal(ops.estimate_blocks(*given), reference(*given))\n"
        "for bad in (float('nan'), 1e38, -1e38):\n"
        "    given[4][:, :, 100:140], given[5][:, :, ::7] = bad, bad\n"
        "    assert torch.equal(ops.estimate_blocks(*given), reference(*given))\n"
    )
    env = {**os.environ, "KVPRESS_CPU": isa}
    here = str(Path(__file__).parents[1] / "tools")
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=here)


@CASES
def test_attention_over_a_map_equals_the_formula(shape: tuple[int, ...]) -> None:
    query, key, value = operands(*shape)
    blocks, scaling = Blocks(*shape[3:5]), shape[5] ** -0.5
    computed = torch.rand(*shape[:2], blocks.rows, blocks.columns) < 0.5
    bits = to_map(computed & blocks.seen(), blocks)
    exact, exact_lse = attend_reference(query, key, value, bits, scaling)
    out, lse = ops.attend_blocks(query, key, value, bits, scaling)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=2e-5)
    _, alone = ops.attend_blocks(query, key, value[..., :0], bits, scaling)
    assert torch.equal(alone, lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_half_precision(dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in operands(1, 4, 2, 150, 300, 64))
    blocks = Blocks(150, 300)
    bits = to_map(blocks.seen().expand(1, 4, -1, -1), blocks)
    out, _ = ops.attend_blocks(query, key, value, bits, 0.125)
    exact = prompt_attention(*(x.float() for x in (query, key, value)), None, 0.125)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)


@CASES
def test_tau_0_is_dense(shape: tuple[int, ...]) -> None:  # S1
    query, key, value = operands(*shape)
    blocks, scaling = Blocks(*shape[3:5]), shape[5] ** -0.5
    out, computed = sparsify.sparse_attention(
        query, key, value, scaling, torch.zeros(shape[1]), local=128
    )
    assert computed.tolist() == [[blocks.causal] * shape[1]] * shape[0]
    dense = prompt_attention(query, key, value, None, scaling)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=2e-5)


def test_tau_infinity_is_first_and_local(local: int = 128) -> None:  # S2
    query, key, _ = operands(1, 2, 1, 800, 800, 64)
    wanted = Blocks(800, 800).always(local).expand(1, 2, -1, -1)
    assert torch.equal(a_map(query, key, float("inf")), wanted)


def test_a_larger_tau_computes_a_subset() -> None:  # S3
    query, key, _ = operands(1, 4, 2, 900, 900, 64)
    maps = [a_map(query, key, tau) for tau in (0.0, 0.05, 0.2, 0.5, 1.0, 4.0)]
    counts = [int(one.sum()) for one in maps]
    assert all(not (larger & ~smaller).any() for smaller, larger in pairwise(maps))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 3


def test_maps_do_not_depend_on_the_mean_or_the_order_of_channels() -> None:  # S4
    query, key, _ = operands(1, 4, 2, 900, 900, 64)
    plain = a_map(query, key, 0.01)
    moved = a_map(query, key + 3 * torch.randn(64), 0.01)
    order = torch.randperm(64)
    turned = a_map(query[..., order], key[..., order], 0.01)
    scaled = a_map(query * 4, key / 4, 0.01)
    for other in (moved, turned, scaled):
        assert (plain != other).float().mean() < 1e-3  # rounding of means and thresholds


def test_with_exact_logits_no_dropped_block_holds_a_large_probability() -> None:  # S5, S10
    query, key, _ = operands(1, 2, 1, 700, 700, 32)
    scaling, tau, blocks = 32**-0.5, 0.3, Blocks(700, 700)
    mean = key.float().mean(2, keepdim=True)
    bound = sparsify.thresholds(query, key, mean, scaling, torch.full((2,), tau), 128)
    smooth = query @ (key - mean).mT  # [1, 2, P, S]
    logits = smooth * scaling
    logits.masked_fill_(torch.ones(700, 700).triu(1).bool(), -torch.inf)
    probability = logits.softmax(-1)
    above = (smooth > bound[..., None]) & logits.isfinite()
    padded = torch.nn.functional.pad(above, (0, -700 % SLOTS, 0, -700 % QUERIES))
    hit = padded.unflatten(3, (-1, SLOTS)).unflatten(2, (-1, QUERIES)).any(-1).any(3)
    computed = hit | blocks.always(128)
    each = computed.repeat_interleave(QUERIES, 2)[:, :, :700].repeat_interleave(SLOTS, 3)[..., :700]
    assert (~each & logits.isfinite()).any() and probability[~each].max() <= tau
    inside = blocks.always(128).repeat_interleave(QUERIES, 0)[:700].repeat_interleave(SLOTS, 1)
    area = logits.masked_fill(~inside[:, :700], -torch.inf)
    score = (logits - area.logsumexp(-1, keepdim=True)).exp()  # the relative attention score
    sure = (score / tau - 1).abs() > 1e-4
    assert torch.equal(above[sure], (score > tau)[sure])


def test_codes_are_near_and_sums_are_exact() -> None:  # S6
    query, key, _ = operands(1, 2, 2, 77, 130, 64)
    keys, own = quantise_keys(key), quantise_queries(query)
    for codes, scale in (
        (own, own.scale[..., None]),
        (keys, of_slots(keys.scale, 130)[..., None]),
    ):
        assert codes.code.abs().max() <= 7
        assert ((codes.smooth / scale - codes.code).abs() <= 0.5 + 1e-5).all()
    high, low = own.code[..., 0::2].int(), own.code[..., 1::2].int()
    k_high, k_low = keys.code[..., 0::2].int(), keys.code[..., 1::2].int()
    shifted = 16 * high @ (16 * k_high).mT + 16 * low @ (16 * k_low).mT
    assert torch.equal(shifted, 256 * (own.code.int() @ keys.code.int().mT))


def test_what_smoothing_takes_is_given_back() -> None:  # S7
    query, key, _ = operands(1, 4, 2, 200, 300, 64)
    keys, own = quantise_keys(key), quantise_queries(query)
    shift = sparsify.lost_by_smoothing(own.mean, keys)
    step = own.scale[..., None] * of_slots(keys.scale, 300).repeat_interleave(2, 1)[:, :, None]
    given = step * (shift[:, :, None] / own.scale[..., None]).round()
    lost = own.mean @ keys.smooth.repeat_interleave(2, 1).mT
    assert ((given - lost).abs() <= 0.5 * step * (1 + 1e-3) + 1e-4).all()


def test_groups_equal_repeated_keys() -> None:  # S9
    query, key, value = operands(1, 6, 2, 500, 500, 64)
    tau = torch.full((6,), 0.01)
    repeated = [x.repeat_interleave(3, 1) for x in (key, value)]
    given = estimate_operands(query, key, 0.01)
    keys = quantise_keys(repeated[0])
    bits = ops.estimate_blocks(*given)
    assert torch.equal(bits, ops.estimate_blocks(*given[:2], keys.code, keys.scale, *given[4:]))
    out = sparsify.sparse_attention(query, key, value, 0.125, tau, 128)[0]
    assert torch.equal(out, sparsify.sparse_attention(query, *repeated, 0.125, tau, 128)[0])


def test_zeros_and_equal_keys_make_no_nan() -> None:
    query, key = torch.zeros(1, 1, 200, 64), torch.ones(1, 1, 200, 64)
    out, _ = sparsify.sparse_attention(query, key, key, 0.125, torch.full((1,), 0.01), 128)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: {**x, "query_BNQD": x["query_BNQD"].float()}, "int8"),
        (lambda x: {**x, "threshold_BNQ": x["threshold_BNQ"].double()}, "float32"),
        (lambda x: {**x, "key_scale_BHJ4": x["key_scale_BHJ4"][:, :, 1:]}, "scales per head"),
        (lambda x: {**x, "shift_BNS": x["shift_BNS"][..., 1:]}, "S is"),
        (lambda x: {**x, "local": -1}, "negative"),
    ],
)
@pytest.mark.parametrize("kind", ["operator", "reference"])
def test_wrong_operands_are_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, kind: str
) -> None:
    run = ops.estimate_blocks if kind == "operator" else estimate_reference
    query, key, _ = operands(1, 2, 1, 100, 100, 16)
    names = "query_BNQD query_scale_BNQ key_BHSD key_scale_BHJ4 shift_BNS threshold_BNQ local"
    given = dict(zip(names.split(), estimate_operands(query, key, 0.01), strict=True))
    with pytest.raises((OperatorError, RuntimeError), match=message):
        run(*(x.contiguous() if torch.is_tensor(x) else x for x in change(given).values()))


@pytest.mark.parametrize("run", [ops.attend_blocks, attend_reference])
def test_a_map_of_another_prompt_is_refused(run: Callable[..., Any]) -> None:
    query, key, value = operands(1, 2, 1, 100, 100, 16)
    with pytest.raises((OperatorError, RuntimeError), match="bytes per head"):
        run(query, key, value, torch.zeros(1, 2, 7, dtype=torch.uint8), 0.25)
    with pytest.raises((OperatorError, RuntimeError), match="100 queries for 50 slots"):
        bits = torch.zeros(1, 2, 7, dtype=torch.uint8)
        run(query, key[:, :, :50], value[:, :, :50], bits, 0.25)


@pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="no C++ compiler here")
def test_memory_grows_with_the_prompt_not_its_square() -> None:
    code = (
        "import resource, torch; from kvpress.pipe.stages import sparsify; torch.manual_seed(0)\n"
        "def run(n):\n"
        "    x = torch.randn(1, 1, n, 32)\n"
        "    sparsify.sparse_attention(x, x, x, 0.2, torch.full((1,), 0.5), 128)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run(1024); before = run(2048); print(run(32768) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 200_000  # KiB; 32,768² bits alone are 131,072


NOISES = [("none", 1.0), ("none", 1.5), ("frozen", 1.0), ("fresh", 1.0), ("fresh", 1.3)]


def a_random_map(batch: int, heads: int, queries: int, slots: int) -> torch.Tensor:
    """Some blocks, and in any case those that are always computed."""
    blocks = Blocks(queries, slots)
    some = torch.rand(batch, heads, blocks.rows, blocks.columns) < 0.3
    return to_map(some & blocks.seen() | blocks.always(32), blocks)


@pytest.mark.parametrize("noise, tau", NOISES)
@pytest.mark.parametrize("shape", [(2, 4, 2, 300, 300, 24), (1, 6, 2, 130, 1100, 40)], ids=str)
def test_sums_over_a_map_equal_the_reference(
    shape: tuple[int, ...], noise: str, tau: float
) -> None:
    query, key, value = operands(*shape)
    position = torch.arange(shape[4]).expand(shape[0], shape[2], -1)
    bits = a_random_map(*shape[:2], *shape[3:5])
    numbers = (Logits(0.15), Reduction(shape[3]), Noise(noise, tau, 5, 3))
    sums = ops.attention_sums(query, key, position, *numbers, bits)
    wanted = sums_reference(query, key, position, *numbers, bits)
    torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sums, ops.attention_sums(query, key, position, *numbers), rtol=1e-3)
    if shape[3] == shape[4]:
        numbers = (Logits(0.15), Noise(noise, tau, 5, 3))
        out, also = ops.attend_sums(query, key, value, position, *numbers, bits)
        exact, _ = attend_reference(query, key, value, bits, 0.15)
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(also, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["operator", "reference"])
def test_sums_over_another_map_are_refused(kind: str) -> None:
    run = ops.attention_sums if kind == "operator" else sums_reference
    query, key, _ = operands(1, 2, 1, 100, 100, 16)
    position = torch.arange(100).expand(1, 1, -1)
    numbers = (Reduction(100), Noise("none", 1.0, 0, 0))
    with pytest.raises((OperatorError, RuntimeError), match="map_BNX"):
        run(query, key, position, Logits(0.2), *numbers, torch.zeros(1, 2, 9, dtype=torch.uint8))
    with pytest.raises((OperatorError, RuntimeError), match="softcap"):
        run(query, key, position, Logits(0.2, 30.0), *numbers, a_random_map(1, 2, 100, 100))
