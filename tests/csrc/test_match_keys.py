"""`match_keys`: the nearest allowed kept key by cosine, in any scale, layout and batch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import matching
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress import ops
from kvpress.errors import OperatorError

reference = ops.implementation("match_keys", "reference")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]
NATIVE = pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="no C++ compiler here")


@pytest.fixture(params=["operator", "reference"])
def run(request: pytest.FixtureRequest) -> Run:
    return ops.match_keys if request.param == "operator" else reference


def rows(*keys: Any) -> torch.Tensor:
    """One row of keys."""
    return torch.tensor(keys, dtype=FP32)[None, None]


def everything(kept: torch.Tensor) -> torch.Tensor:
    return torch.ones(kept.shape[:3], dtype=torch.bool)


def test_the_worked_example(run: Run) -> None:
    kept, evicted = rows((1, 0), (0, 1), (0.6, 0.8)), rows((2, 0), (0.8, 0.6), (-1, 0))
    similarity, target = run(evicted, kept, everything(kept))
    torch.testing.assert_close(similarity, torch.tensor([[[1.0, 0.96, 0.0]]]), rtol=0, atol=1e-6)
    assert target.tolist() == [[[0, 2, 1]]]


# id: B, H, E, C, D, dtype, size
SHAPES = {
    "E1-C1-D2": (1, 1, 1, 1, 2, FP32, 1.0),
    "E1-C17-D64": (2, 3, 1, 17, 64, FP32, 1.0),
    "E25-C129-D7": (1, 2, 25, 129, 7, FP32, 1.0),
    "E63-C1-D64": (1, 2, 63, 1, 64, FP32, 1.0),
    "E97-C300-D80-bf16": (2, 2, 97, 300, 80, BF16, 1.0),
    "E200-C67-D96-fp16": (1, 3, 200, 67, 96, FP16, 1.0),
    "E31-C257-D128-bf16": (1, 2, 31, 257, 128, BF16, 3.0),
    "E53-C509-D256": (1, 1, 53, 509, 256, FP32, 1.0),
    "E700-C400-D64": (1, 2, 700, 400, 64, FP32, 1.0),
    "E48-C128-D64-fp16-small": (1, 2, 48, 128, 64, FP16, 1e-3),
    "E48-C128-D64-fp16-large": (1, 2, 48, 128, 64, FP16, 1e4),
    "E40-C100-D64-small": (1, 1, 40, 100, 64, FP32, 1e-14),
    "E40-C100-D64-large": (1, 1, 40, 100, 64, FP32, 1e17),
    "E40-C100-D64-bf16-large": (1, 1, 40, 100, 64, BF16, 1e17),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula(shape: tuple[Any, ...]) -> None:
    tensors = matching.operands(*shape)
    plain, _ = result = reference(*tensors)
    matching.agree(result, plain, tensors)
    matching.agree(ops.match_keys(*tensors), plain, tensors)


def test_a_key_of_norm_zero_has_cosine_zero(run: Run) -> None:
    kept, evicted = rows((0, 0), (1, 0), (-1, 0)), rows((0, 0), (0, -1), (3, 0), (-3, 1))
    for allowed, targets in ((everything(kept), [0, 0, 1, 2]), (kept[..., 0] >= 0, [0, 0, 1, 0])):
        similarity, target = run(evicted, kept, allowed)
        assert target.tolist() == [[targets]]
        assert similarity[..., :3].tolist() == [[[0, 0, 1]]]
    assert similarity[..., 3] == 0  # the only others would be negative


def test_of_equal_cosines_the_lowest_index_is_taken(run: Run) -> None:
    tensors, targets = matching.along_axes()
    similarity, target = run(*tensors)
    assert target.tolist() == [[targets]] and (similarity == 1).all()


@NATIVE
def test_of_equal_keys_the_lowest_index_is_taken() -> None:
    evicted, few, _ = matching.operands(1, 2, 90, 7, 64, FP32)
    first = ops.match_keys(evicted, few, everything(few))
    kept = few.repeat(1, 1, 61, 1)
    assert all(map(torch.equal, ops.match_keys(evicted, kept, everything(kept)), first))


@NATIVE
@settings(max_examples=25, deadline=None)
@given(st.integers(-40, 40), st.integers(-40, 40), st.integers(0, 1 << 20))
def test_scales_by_powers_of_two_change_nothing(of_evicted: int, of_kept: int, seed: int) -> None:
    torch.manual_seed(seed)
    evicted, kept, allowed = matching.operands(1, 1, 30, 70, 20, FP32)
    wanted = ops.match_keys(evicted, kept, allowed)
    result = ops.match_keys(evicted * 2.0**of_evicted, kept * 2.0**of_kept, allowed)
    assert all(map(torch.equal, result, wanted))


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-10, 1e10), st.floats(1e-10, 1e10), st.integers(0, 1 << 20))
def test_other_scales_change_rounding_only(of_evicted: float, of_kept: float, seed: int) -> None:
    torch.manual_seed(seed)
    evicted, kept, allowed = matching.operands(1, 1, 30, 70, 20, FP32)
    for run in (ops.match_keys, reference):
        wanted, _ = run(evicted, kept, allowed)
        similarity, _ = run(evicted * of_evicted, kept * of_kept, allowed)
        torch.testing.assert_close(similarity, wanted, rtol=0, atol=1e-6)


def test_kept_keys_in_another_order_are_the_same_targets() -> None:
    evicted, kept, allowed = matching.operands(1, 2, 100, 333, 40, FP32)
    kept, allowed = kept[:, :, 1:], allowed[:, :, 1:]
    order = torch.randperm(332)
    similarity, target = ops.match_keys(evicted, kept[:, :, order], allowed[:, :, order])
    wanted, index = ops.match_keys(evicted, kept, allowed)
    torch.testing.assert_close(similarity, wanted, rtol=0, atol=1e-6)
    moved = evicted.norm(dim=-1) > 0  # a key of norm 0 has the first slot in any order
    assert torch.equal(order[target][moved], index[moved])


def test_rows_without_an_allowed_slot_have_no_target(run: Run) -> None:
    evicted, kept, allowed = matching.operands(2, 2, 30, 40, 16, FP32)
    allowed[1, 0] = False
    similarity, target = run(evicted, kept, allowed)
    assert (similarity[1, 0] == -torch.inf).all() and (target[1, 0] == -1).all()
    assert similarity[0].isfinite().all() and (target[0] >= 0).all()


@pytest.mark.parametrize(("batch", "evicted", "kept"), [(2, 0, 9), (2, 9, 0), (2, 0, 0), (0, 9, 9)])
def test_empty_rows(run: Run, batch: int, evicted: int, kept: int) -> None:
    keys = torch.randn(batch, 3, evicted, 8), torch.randn(batch, 3, kept, 8)
    similarity, target = run(*keys, everything(keys[1]))
    assert similarity.shape == target.shape == (batch, 3, evicted)
    assert (similarity == -torch.inf).all() == (not kept or not similarity.numel())
    assert not similarity.numel() or (target == -1).all() == (not kept)


def test_keys_that_are_no_numbers_match_nothing(run: Run) -> None:
    evicted, kept, allowed = matching.operands(1, 1, 30, 40, 16, FP32)
    allowed[:] = True
    broken = (torch.inf, -torch.inf, torch.nan, 1e25)  # the square of the last overflows
    for number, value in enumerate(broken):
        kept[0, 0, 3 + number, number] = value
        evicted[0, 0, 7 + number, number] = value
    similarity, target = run(evicted, kept, allowed)
    none, never = torch.zeros(30, dtype=torch.bool), ~allowed
    none[7:11] = never[..., 3:7] = True
    assert (similarity[0, 0, none] == -torch.inf).all() and (target[0, 0, none] == -1).all()
    wanted = run(evicted[:, :, ~none], kept, ~never)
    assert torch.equal(target[:, :, ~none], wanted[1])
    torch.testing.assert_close(similarity[:, :, ~none], wanted[0], rtol=0, atol=1e-6)


@NATIVE
def test_strides_change_nothing() -> None:
    evicted, kept, allowed = (x.contiguous() for x in matching.operands(2, 3, 70, 90, 24, FP32))
    wanted = ops.match_keys(evicted, kept, allowed)
    wide = torch.randn(2, 3, 140, 48)
    wide[:, :, ::2, 5:29] = evicted
    channel_major = kept.mT.contiguous().mT
    slot_major = allowed.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert all(
        map(torch.equal, ops.match_keys(wide[:, :, ::2, 5:29], channel_major, slot_major), wanted)
    )
    shared = ops.match_keys(
        evicted[:, :1].expand(-1, 3, -1, -1), kept, allowed[:1].expand(2, -1, -1)
    )
    assert torch.equal(shared[1][0, 0], wanted[1][0, 0])


@NATIVE
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_row_does_not_depend_on_its_batch_or_the_threads(dtype: torch.dtype) -> None:
    tensors = matching.operands(2, 2, 900, 500, 64, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    together = ops.match_keys(*tensors)
    for number in (1, 3):
        torch.set_num_threads(number)
        alone = ops.match_keys(*(x[1:, :1] for x in tensors))
        assert all(torch.equal(a[0, 0], t[1, 0]) for a, t in zip(alone, together, strict=True))
    torch.set_num_threads(threads)


def test_no_matrix_of_all_cosines_is_held() -> None:
    """Of 10,000 × 10,000 cosines, 381 MiB, a process holds a twentieth at most."""
    program = """
import resource, torch
from kvpress import ops
reference = ops.implementation("match_keys", "reference")
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
keys = torch.randn(1, 1, 10_000, 8)
allowed = torch.ones(1, 1, 10_000, dtype=torch.bool)
for run in (ops.match_keys, reference):
    run(keys[:, :, :64], keys[:, :, :64], allowed[:, :, :64])
    before = peak()
    run(keys, keys, allowed)
    print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    native, plain = map(int, done.stdout.split())
    assert native < 20 << 10 and plain < 20 << 10


def test_bad_operands_are_refused_by_name(run: Run) -> None:
    evicted, kept, allowed = matching.operands(2, 2, 5, 9, 16, FP32)
    wide = torch.randn(2, 2, 5, 648)
    refused: list[tuple[tuple[torch.Tensor, ...], str]] = [
        ((evicted[0], kept, allowed), "evicted_BHVD has 3 dimensions"),
        ((evicted, kept[..., :8], allowed), "kept_BHKD has shape .* but D is 16"),
        ((evicted, kept[:, :1], allowed), "but H is 2"),
        ((evicted, kept, allowed[..., :8]), "allowed_BHK has shape .* but K is 9"),
        ((evicted, kept, allowed.int()), "allowed_BHK .*bool"),
        ((evicted.int(), kept.int(), allowed), "evicted_BHVD .*float32, bfloat16 or float16"),
        ((evicted, kept.half(), allowed), "kept_BHKD .*must be"),
        ((wide, wide, allowed[..., :5]), "D is 648; at most 640"),
    ]
    for tensors, message in refused:
        with pytest.raises((OperatorError, RuntimeError), match=message):
            run(*tensors)


def test_opcheck() -> None:
    for tensors in (
        matching.operands(1, 2, 9, 5, 16, BF16),
        matching.operands(1, 2, 3, 0, 8, FP32),
    ):
        torch.library.opcheck(torch.ops.kvpress.match_keys.default, tensors)
