"""The Triton kernels against float64 formulas and the references: on a GPU, or interpreted.

Tolerance: at most twice the error of the PyTorch reference in fp32, and a little for results near
zero. What is moved, kept or evicted is compared exactly.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import blocking
import calls
import matching
import packing
import pytest
import torch
from interpreted import DEVICE, INTERPRETED, Run, run
from outcomes import compare, outcome

from kvpress.errors import OperatorError
from kvpress.formulas import noise as engine_noise
from kvpress.formulas.attention import prompt_attention
from kvpress.formulas.block_map import Blocks, to_map
from kvpress.ops import Bounds, Columns, Logits, Noise, Old, Pages, Reduction, Token
from kvpress.ops.registry import has_triton, implementation

triton = pytest.importorskip("triton")
tl = triton.language

__all__ = ["run"]  # a fixture
NOWHERE = 1 << 30  # a page that does not exist
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def within(given: torch.Tensor, pytorch: torch.Tensor, exact: torch.Tensor) -> None:
    """Asserts the tolerance rule; infinities must be the same."""
    assert given.dtype == pytorch.dtype and given.shape == pytorch.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(given.isfinite(), finite)
    assert torch.equal(given.double()[~finite], exact[~finite])
    size = max(1.0, float(exact[finite].abs().max())) if finite.any() else 1.0
    error, allowed = ((x.double() - exact)[finite].abs() for x in (given, pytorch))
    assert not finite.any() or error.max() <= 2 * allowed.max() + 1e-5 * size


@dataclass(frozen=True)
class Rows:
    """Ragged rows in poisoned pages, and the same rows dense."""

    key_PDS: torch.Tensor
    value_PSE: torch.Tensor
    position_PS: torch.Tensor
    mass_PS: torch.Tensor
    table_RW: torch.Tensor
    counts_R: torch.Tensor

    def pages(self, wild: bool) -> Pages:
        """As operators take them. The table names missing pages for slots that no row has."""
        table = self.table_RW if wild else self.table_RW.clamp(max=len(self.key_PDS) - 1)
        return Pages(self.key_PDS, self.value_PSE, table, self.counts_R)

    def dense(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one row, float64."""
        page_slots = self.key_PDS.shape[2]
        slot = torch.arange(int(self.counts_R[row]), device=DEVICE)
        page, offset = self.table_RW[row].long()[slot // page_slots], slot % page_slots
        return self.key_PDS[page, :, offset].double(), self.value_PSE[page, offset].double()

    def copy(self) -> Rows:
        return Rows(*(getattr(self, name).clone() for name in Rows.__dataclass_fields__))


def make_rows(
    counts: list[int], width: int, value_width: int, page: int, dtype: torch.dtype, spare: int = 0
) -> Rows:
    """Rows with random content at the positions 0, 1, …, shuffled."""
    wide = -(-(max(counts) + spare) // page)
    needed = [-(-(count + spare) // page) for count in counts]
    pages = sum(needed) + 2
    order = torch.randperm(pages).int()
    table = torch.full((len(counts), wide), NOWHERE, dtype=torch.int32)
    key, value = (
        torch.full((pages, width, page), torch.nan),
        torch.full((pages, page, value_width), torch.nan),
    )
    position = torch.full((pages, page), -7, dtype=torch.int32)
    mass = torch.full((pages, page), torch.nan)
    for row, count in enumerate(counts):
        table[row, : needed[row]] = order[: needed[row]]
        order = order[needed[row] :]
        slot = torch.arange(count)
        at, offset = table[row].long()[slot // page], slot % page
        key[at, :, offset] = torch.randn(count, width)
        value[at, offset] = torch.randn(count, value_width)
        position[at, offset] = torch.randperm(count).int()
        mass[at, offset] = torch.rand(count)
    made = (key.to(dtype), value.to(dtype), position, mass, table, torch.tensor(counts))
    return Rows(*(x.to(DEVICE) for x in made))


def attention(
    query: torch.Tensor, rows: Rows, scaling: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, LSE and weights of `decode_rows` in float64, row by row."""
    batch, query_heads, queries, _ = query.shape
    page_slots, value_width = rows.value_PSE.shape[1:]
    group = batch * query_heads // len(rows.counts_R)
    query_RGQD = query.double().reshape(-1, group, queries, query.shape[3])
    slots = rows.table_RW.shape[1] * page_slots
    out = query_RGQD.new_zeros(*query_RGQD.shape[:3], value_width)
    lse = query_RGQD.new_full(query_RGQD.shape[:3], -torch.inf)
    weights = query_RGQD.new_zeros(*query_RGQD.shape[:3], slots)
    for row, count in enumerate(rows.counts_R.tolist()):
        key, value = rows.dense(row)
        for q in range(queries):
            seen = count - queries + q + 1
            if seen <= 0:
                continue
            x_GS = query_RGQD[row, :, q] @ key[:seen].T * scaling
            x_GS = torch.tanh(x_GS / softcap) * softcap if softcap else x_GS
            lse[row, :, q] = x_GS.logsumexp(-1)
            weights[row, :, q, :seen] = x_GS.softmax(-1)
            out[row, :, q] = x_GS.softmax(-1) @ value[:seen]
    shape = (batch, query_heads, queries)
    return out.view(*shape, -1), lse.view(shape), weights.view(*shape, slots)


# id: batch, counts, group, queries, D, E, page, query dtype, storage dtype, softcap
ATTENTION = {
    "G1-Q1-D64-page16": (2, [0, 1, 17, 63], 1, 1, 64, 64, 16, FP32, FP32, 0.0),
    "G3-Q2-D80-E64-page5-softcap": (1, [41, 1], 3, 2, 80, 64, 5, FP32, FP32, 4.0),
    "G4-Q7-D96-page1": (2, [29, 3], 4, 7, 96, 96, 1, FP32, FP32, 0.0),
    "G8-Q1-D128-page64-bf16": (1, [131, 64], 8, 1, 128, 128, 64, BF16, BF16, 0.0),
    "G16-Q32-D32-page16-fp16": (1, [37], 16, 32, 32, 32, 16, FP16, FP16, 0.0),
    "G4-Q1-D256-page16-fp16-softcap": (1, [53, 0], 4, 1, 256, 256, 16, FP16, FP16, 30.0),
    "G4-Q1-D576-E512-by-the-reference": (1, [53, 0], 4, 1, 576, 512, 16, FP32, FP32, 0.0),
    "G4-Q1-D32-several-chunks": (1, [1103, 513], 4, 1, 32, 32, 16, FP32, FP32, 0.0),
    "G1-Q2-D64-fp32-query-of-bf16": (2, [23, 7], 1, 2, 64, 80, 16, FP32, BF16, 0.0),
    "G1-Q1-D64-fp16-query-of-fp32": (2, [23, 7], 1, 1, 64, 32, 16, FP16, FP32, 0.0),
}


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_decode_rows_equals_the_formula(run: Run, case: tuple[Any, ...]) -> None:
    batch, counts, group, queries, width, value_width, page, query_dtype, dtype, softcap = case
    rows = make_rows(counts, width, value_width, page, dtype)
    query_heads = len(counts) // batch * group
    query = torch.randn(batch, queries, query_heads, width, device=DEVICE).to(query_dtype)
    query = query.transpose(1, 2)  # as models make it
    given = run("decode_rows", query, rows.pages(wild=True), Logits(0.3, softcap), True)
    pytorch = implementation("decode_rows", "reference")(
        query, rows.pages(wild=False), Logits(0.3, softcap), True
    )
    exact = attention(query, rows, 0.3, softcap)
    for one, reference, wanted in zip(given, pytorch, exact, strict=True):
        within(one, reference, wanted)
    sees = (exact[1] > -torch.inf).float()
    torch.testing.assert_close(given[2].sum(-1), sees, rtol=1e-5, atol=1e-6)
    assert (given[0][sees == 0] == 0).all()


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_chunks_of_rows_equal_the_reference_and_join(run: Run, case: tuple[Any, ...]) -> None:
    batch, counts, group, queries, width, value_width, page, query_dtype, dtype, softcap = case
    rows = make_rows(counts, width, value_width, page, dtype)
    query = torch.randn(batch, queries, len(counts) // batch * group, width, device=DEVICE)
    query = query.to(query_dtype).transpose(1, 2)
    out, lse, weights = run(
        "attend_parts", query, rows.pages(wild=True), Logits(0.3, softcap), True
    )
    wanted = implementation("attend_parts", "reference")(
        query, rows.pages(wild=False), Logits(0.3, softcap), True
    )
    for one, other in zip((out, lse, weights), wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == FP32
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
    assert (out[lse == -torch.inf] == 0).all()
    exact_out, exact_lse, _ = attention(query, rows, 0.3, softcap)
    joined, joined_lse = implementation("join_parts", "reference")(out, lse)
    torch.testing.assert_close(joined.double(), exact_out, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(joined_lse.double(), exact_lse, rtol=1e-4, atol=2e-5)


def test_rows_without_pages_have_no_chunks(run: Run) -> None:
    rows = make_rows([0, 0], 32, 32, 16, FP32)
    query = torch.randn(1, 2, 1, 32, device=DEVICE)
    out, lse, weights = run("attend_parts", query, rows.pages(wild=True), Logits(0.3), True)
    assert out.shape == (0, 1, 2, 1, 32) and lse.shape == (0, 1, 2, 1)
    assert weights.shape == (1, 2, 1, 0)


def test_decode_rows_without_weights_is_the_same_attention(run: Run) -> None:
    rows = make_rows([19, 5], 32, 32, 16, FP32)
    query = torch.randn(2, 2, 1, 32, device=DEVICE)
    full = run("decode_rows", query, rows.pages(wild=True), Logits(0.3), True)
    bare = run("decode_rows", query, rows.pages(wild=True), Logits(0.3), False)
    assert torch.equal(full[0], bare[0]) and torch.equal(full[1], bare[1])
    assert bare[2].shape == (0,)


def test_decode_rows_of_rows_without_pages_is_zero(run: Run) -> None:
    rows = make_rows([0, 0], 32, 32, 16, FP32)
    query = torch.randn(1, 2, 1, 32, device=DEVICE)
    out, lse, weights = run("decode_rows", query, rows.pages(wild=True), Logits(0.3), True)
    assert (out == 0).all() and (lse == -torch.inf).all() and weights.shape == (1, 2, 1, 0)


def test_operands_that_do_not_fit_are_refused(run: Run) -> None:
    rows = make_rows([3, 5], 32, 32, 16, FP32)
    query = torch.randn(1, 2, 1, 64, device=DEVICE)
    with pytest.raises(OperatorError, match="key_PDS"):
        run("decode_rows", query, rows.pages(wild=True), Logits(0.3), True)


def step_both(
    run: Run, given: Rows, wanted: Rows, massive: bool, group: int, *options: Any
) -> None:
    """One decode step in both sets of rows, which must stay the same. B = 2, H = 2."""
    bounds, *choices = options
    width, value_width = given.key_PDS.shape[1], given.value_PSE.shape[2]
    fused = torch.randn(2, 1, 2 * group + 2, width, device=DEVICE).to(given.key_PDS.dtype)
    query, key = fused.transpose(1, 2).split([2 * group, 2], 1)
    value = torch.randn(2, 2, 1, value_width, device=DEVICE).to(given.key_PDS.dtype)
    outputs = []
    for rows, wild in ((given, True), (wanted, False)):
        columns = Columns(rows.position_PS, rows.mass_PS if massive else None)
        args = (Token(query, key, value), rows.pages(wild), columns, bounds, *choices)
        reference = implementation("decode_step", "reference")
        outputs.append(run("decode_step", *args) if wild else reference(*args))
    torch.testing.assert_close(*outputs)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    assert torch.equal(given.counts_R, wanted.counts_R)
    assert torch.equal(given.position_PS, wanted.position_PS)
    torch.testing.assert_close(given.key_PDS, wanted.key_PDS, **same)
    torch.testing.assert_close(given.value_PSE, wanted.value_PSE, **same)
    close = {"rtol": 1e-4, "atol": 1e-5} if massive else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(given.mass_PS, wanted.mass_PS, **close, equal_nan=True)


# id: group, D, page, dtype, mass, evict, rank, noise, tau, softcap
STEPS = {
    "mass-G4-D64-page16": (4, 64, 16, FP32, True, True, "mass", "none", 1.0, 0.0),
    "mass-G3-D80-page5-tau": (3, 80, 5, FP32, True, True, "mass", "none", 0.6, 5.0),
    "mass-G1-D32-page1-frozen": (1, 32, 1, FP32, True, True, "mass", "frozen", 1.0, 0.0),
    "age-G4-D96-page64-fresh": (4, 96, 64, FP32, True, True, "mass_per_age", "fresh", 1.5, 0.0),
    "age-G8-D128-page16-fp16": (8, 128, 16, FP16, True, True, "mass_per_age", "fresh", 1.0, 0.0),
    "position-G16-D32": (16, 32, 16, FP32, False, True, "position", "none", 1.0, 0.0),
    "position-of-rows-with-mass": (2, 32, 16, FP32, True, True, "position", "none", 1.0, 0.0),
    "observing-only": (2, 32, 16, FP32, True, False, "mass", "frozen", 0.7, 0.0),
    "attending-only": (2, 32, 16, BF16, False, False, "position", "none", 1.0, 0.0),
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_decode_steps_leave_the_same_rows_as_the_reference(run: Run, case: tuple[Any, ...]) -> None:
    group, width, page, dtype, massive, evict, rank, noise, tau, softcap = case
    given = make_rows([0, 9, 23, 19], width, width, page, dtype, spare=4)
    wanted = given.copy()
    quota_R = torch.tensor([2, 9, 18, 40], device=DEVICE)
    recent_R = torch.tensor([3, 1, 2, 6], device=DEVICE)
    sink_B = torch.tensor([2, 3], device=DEVICE)
    for step in range(4):
        seen_B = torch.tensor([10, 24], device=DEVICE) + step
        bounds = Bounds(seen_B, quota_R, recent_R, sink_B, rank)
        numbers = (evict, Noise(noise, tau, (5 << 32) + 12345, 3, 6), Logits(0.3, softcap))
        step_both(run, given, wanted, massive, group, bounds, *numbers)
    expected = [3, 9, 23, 23] if evict else [4, 13, 27, 23]
    assert given.counts_R.tolist() == expected


def victims(
    run: Run,
    mass: list[float],
    rank: str,
    sink: int,
    recent: int,
    group: int = 1,
    reverse: bool = False,
) -> list[int]:
    """Which of the positions 0, 1, … is missing after a step in which nothing is attended to.

    reverse: the last position stands in the first slot.
    """
    rows = make_rows([len(mass)], 32, 32, 4, FP32, spare=1)
    rows.key_PDS.zero_()
    position_S = torch.arange(len(mass), device=DEVICE)
    address = position_S.flip(0) if reverse else position_S
    page_S = rows.table_RW[0].long()[address // 4]
    rows.mass_PS[page_S, address % 4] = torch.tensor(mass, device=DEVICE)
    rows.position_PS[page_S, address % 4] = position_S.int()
    one, query = (
        torch.zeros(1, 1, 1, 32, device=DEVICE),
        torch.zeros(1, group, 1, 32, device=DEVICE),
    )
    numbers = torch.tensor([[len(mass) + 1], [len(mass)], [recent], [sink]], device=DEVICE)
    held = (rows.pages(True), Columns(rows.position_PS, rows.mass_PS))
    bounds = Bounds(*numbers, rank)
    choices = (bounds, True, Noise("none", 1.0, 0, 0))
    run("decode_step", Token(query, one, one), *held, *choices, Logits(1.0))
    kept = torch.arange(int(rows.counts_R[0]), device=DEVICE)
    left = rows.position_PS[rows.table_RW[0].long()[kept // 4], kept % 4].tolist()
    return sorted(set(range(len(mass) + 1)) - set(left))


@pytest.mark.parametrize("reverse", [False, True])
def test_of_slots_that_rank_the_same_the_latest_goes(run: Run, reverse: bool) -> None:
    assert victims(run, [1.0, 1.0, 1.0, 1.0, 1.0], "mass", 0, 1, reverse=reverse) == [4]
    assert victims(run, [1.0, 0.5, 0.5, 1.0, 1.0], "mass", 0, 1, reverse=reverse) == [2]
    many = [0.5 if slot in (3, 67, 131) else 1.0 for slot in range(140)]
    # in several blocks of slots
    assert victims(run, many, "mass", 0, 1, group=32, reverse=reverse) == [131]


def test_a_mass_that_is_no_number_goes_first(run: Run) -> None:
    assert victims(run, [0.1, 1.0, torch.nan, 1.0, 0.1], "mass", 0, 1) == [2]
    assert victims(run, [torch.nan, 1.0, 3.0, 1.0, 2.0], "mass_per_age", 0, 1) == [0]


def test_protected_slots_stay_and_rows_without_others_keep_everything(run: Run) -> None:
    assert victims(run, [0.0, 0.0, 5.0, 4.0, 0.0], "mass", 2, 2) == [3]
    assert victims(run, [0.0, 0.0, 5.0, 4.0, 0.0], "mass", 2, 4) == []


def dense_sums(
    query: torch.Tensor, key: torch.Tensor, position: torch.Tensor, *numbers: Any
) -> torch.Tensor:
    """`attention_sums` in float64 with the engine's uniform numbers, by the Q×S matrix."""
    (scaling, softcap), (window, largest, weight), (noise, tau, seed, layer, first) = numbers
    (_, query_heads, new, _), (_, heads, slots, _) = query.shape, key.shape
    group = query_heads // heads
    x = query.unflatten(1, (heads, group)).double() @ key.double()[:, :, None].mT * scaling
    x = torch.tanh(x / softcap) * softcap if softcap else x
    if noise != "none":
        head = torch.arange(first, first + query_heads, device=DEVICE)
        head = head.view(1, heads, group, 1, 1)
        own = position[:, :, None, slots - new :, None]
        own = torch.full_like(own, engine_noise.NO_QUERY) if noise == "frozen" else own
        u = engine_noise.uniform(seed, layer, head, own, position[:, :, None, None])
        x = x - (-u.double().log()).log()
    future = torch.arange(slots) > torch.arange(slots - new, slots)[:, None]
    x = (x / tau).masked_fill(future.to(DEVICE), -torch.inf)
    x = x.masked_fill((position < 0)[:, :, None, None], -torch.inf)
    w = x.softmax(-1) if weight is None else x.softmax(-1) * weight[:, None, None, :, None]
    w = w[..., new - min(window, new) :, :]
    return (w.amax(3) if largest else w.sum(3)).flatten(1, 2)


# id: group, P, S, D, dtype, softcap, window, noise, tau
SUMS = {
    "G1-P19-S31-D32": (1, 19, 31, 32, FP32, 0.0, 100, "none", 1.0),
    "G3-P7-S7-D80-softcap-fresh-tau": (3, 7, 7, 80, FP32, 4.0, 7, "fresh", 0.7),
    "G4-P37-S71-D96-window-frozen": (4, 37, 71, 96, FP32, 0.0, 7, "frozen", 1.0),
    "G8-P1-S67-D128-bf16-fresh": (8, 1, 67, 128, BF16, 0.0, 1, "fresh", 1.0),
    "G16-P2-S131-D64-fp16": (16, 2, 131, 64, FP16, 0.0, 100, "none", 1.0),
    "G2-P70-S140-D64-fp16-fresh": (2, 70, 140, 64, FP16, 0.0, 100, "fresh", 1.0),
    "G1-P32-S53-D256-frozen-tau": (1, 32, 53, 256, FP32, 0.0, 32, "frozen", 1.6),
    "G1-P5-S11-D32-nothing": (1, 5, 11, 32, FP32, 0.0, 0, "none", 1.0),
}
PLAIN = ["G1-P19-S31-D32", "G3-P7-S7-D80-softcap-fresh-tau", "G16-P2-S131-D64-fp16"]
PLAIN += ["G8-P1-S67-D128-bf16-fresh", "G2-P70-S140-D64-fp16-fresh"]


@pytest.mark.parametrize("case", SUMS.values(), ids=SUMS)
def test_attention_sums_equal_the_formula(run: Run, case: tuple[Any, ...]) -> None:
    group, new, slots, width, dtype, softcap, window, noise, tau = case
    query = torch.randn(2, new, 2 * group, width, device=DEVICE).to(dtype).transpose(1, 2)
    key = torch.randn(2, slots, 2, width, device=DEVICE).to(dtype).transpose(1, 2)
    position = torch.arange(slots, device=DEVICE).repeat(2, 2, 1)
    position[1, 0, : slots - new] = -1  # a row that evicted more than the others
    numbers = (Logits(0.3, softcap), Reduction(window), Noise(noise, tau, (7 << 40) + 99, 5, 4))
    given = run("attention_sums", query, key, position, *numbers)
    pytorch = implementation("attention_sums", "reference")(query, key, position, *numbers)
    within(given, pytorch, dense_sums(query, key, position, *numbers))
    assert (given[(position < 0).repeat_interleave(group, 1)] == 0).all()
    total = torch.full((2, 2 * group), float(min(window, new)), device=DEVICE)
    torch.testing.assert_close(given.sum(-1), total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", [SUMS[name] for name in PLAIN], ids=PLAIN)
def test_the_largest_weights_equal_the_formula(
    run: Run, case: tuple[Any, ...], weighted: bool
) -> None:
    group, new, slots, width, dtype, softcap, window, *_ = case
    query = torch.randn(2, new, 2 * group, width, device=DEVICE).to(dtype).transpose(1, 2)
    key = torch.randn(2, slots, 2, width, device=DEVICE).to(dtype).transpose(1, 2)
    position = torch.arange(slots, device=DEVICE).repeat(2, 2, 1)
    position[1, 0, : slots - new] = -1
    weight = torch.rand(2, new, device=DEVICE) * 5 if weighted else None
    noise = Noise("none", 1.0, 0, 0)
    for largest in (True, False) if weighted else (True,):
        numbers = (Logits(0.3, softcap), Reduction(window, largest, weight), noise)
        given = run("attention_sums", query, key, position, *numbers)
        pytorch = implementation("attention_sums", "reference")(query, key, position, *numbers)
        within(given, pytorch, dense_sums(query, key, position, *numbers))
        assert (given[(position < 0).repeat_interleave(group, 1)] == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where Triton is interpreted
def test_the_largest_of_what_is_no_number_is_none(run: Run) -> None:
    query, key = (torch.randn(1, 1, 40, 32, device=DEVICE) for _ in range(2))
    key[0, 0, 30] = torch.nan
    numbers = (Logits(0.3), Reduction(40, True), Noise("none", 1.0, 0, 0))
    position = torch.arange(40, device=DEVICE)[None, None]
    given = run("attention_sums", query, key, position, *numbers)
    assert bool(given[0, 0, :31].isnan().all())


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_attend_sums_are_attention_and_its_sums(run: Run, softcap: float) -> None:
    shapes = ((4, 64), (2, 64), (2, 48))
    query, key, value = (torch.randn(2, n, 37, width, device=DEVICE) for n, width in shapes)
    position = torch.arange(37, device=DEVICE).repeat(2, 2, 1)
    logits, noise = Logits(0.3, softcap), Noise("fresh", 0.7, (7 << 40) + 99, 5)
    # Not by `run`: cuBLAS, which attention may use, refuses to be deterministic.
    attend_sums = implementation("attend_sums", "triton_kernel")
    out, sums = attend_sums(query, key, value, position, logits, noise)
    assert torch.equal(out, prompt_attention(query, key, value, None, 0.3, softcap))
    assert torch.equal(
        sums, run("attention_sums", query, key, position, logits, Reduction(37), noise)
    )


# id: B, H, E, C, D, dtype, size
MATCHES = {
    "E1-C1-D2": (1, 1, 1, 1, 2, FP32, 1.0),
    "E40-C70-D7": (2, 2, 40, 70, 7, FP32, 1.0),
    "E67-C131-D80": (1, 3, 67, 131, 80, FP32, 1.0),
    "E17-C35-D256": (1, 1, 17, 35, 256, FP32, 1.0),
    "E70-C129-D64-bf16": (2, 2, 70, 129, 64, BF16, 1.0),
    "E65-C64-D96-fp16": (1, 2, 65, 64, 96, FP16, 1.0),
    "E9-C40-D64-fp16-small": (1, 2, 9, 40, 64, FP16, 1e-3),
    "E9-C40-D64-fp16-large": (1, 2, 9, 40, 64, FP16, 1e4),
    "E9-C40-D64-bf16-large": (1, 2, 9, 40, 64, BF16, 1e17),
    "E9-C40-D64-small": (1, 2, 9, 40, 64, FP32, 1e-14),
}


@pytest.mark.parametrize("case", MATCHES.values(), ids=MATCHES)
def test_match_keys_equals_the_formula(run: Run, case: tuple[Any, ...]) -> None:
    tensors = matching.operands(*case, device=DEVICE)
    plain, _ = implementation("match_keys", "reference")(*tensors)
    matching.agree(run("match_keys", *tensors), plain, tensors)


def test_match_keys_of_equal_cosines_is_the_first(run: Run) -> None:
    tensors, targets = matching.along_axes(DEVICE)
    similarity, target = run("match_keys", *tensors)
    assert target.tolist() == [[targets]]
    torch.testing.assert_close(similarity, torch.ones_like(similarity))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_match_keys_without_a_target(run: Run) -> None:
    evicted, kept, allowed = matching.operands(2, 2, 40, 50, 16, FP32, device=DEVICE)
    allowed[1, 0] = False
    evicted[0, 0, 3, 2], kept[0, 0, 5, 1], allowed[0, 0, 5] = torch.nan, torch.inf, True
    similarity, target = run("match_keys", evicted, kept, allowed)
    none = torch.zeros(2, 2, 40, dtype=torch.bool, device=DEVICE)
    none[1, 0] = none[0, 0, 3] = True
    assert torch.equal(similarity == -torch.inf, none) and torch.equal(target == -1, none)
    assert (target[0, 0] != 5).all()
    similarity, target = run("match_keys", evicted, kept[:, :, :0], allowed[..., :0])
    assert (similarity == -torch.inf).all() and (target == -1).all()
    similarity, target = run("match_keys", evicted[:, :, :0], kept, allowed)
    assert similarity.shape == target.shape == (2, 2, 0)


def test_match_keys_of_a_row_does_not_depend_on_its_batch(run: Run) -> None:
    tensors = matching.operands(2, 2, 40, 70, 32, FP32, device=DEVICE)
    together = run("match_keys", *tensors)
    alone = run("match_keys", *(x[1:, 1:] for x in tensors))
    assert all(torch.equal(a[0, 0], t[1, 1]) for a, t in zip(alone, together, strict=True))


def draw_kernel(
    out, stream, head, query, ROW: tl.constexpr, DRAW: tl.constexpr, BLOCK: tl.constexpr
):
    key = tl.arange(0, BLOCK)
    tl.store(out + key, DRAW(ROW(stream, head, query), key))


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, (1 << 63) - 25])
def test_noise_is_that_of_the_engine_bit_for_bit(run: Run, seed: int) -> None:
    common = importlib.import_module("kvpress.csrc.triton_common")
    head, query, keys = 7, -1, 1 << 14
    out = torch.empty(keys, device=DEVICE)
    args = (out, common.noise_stream(seed, 11, 0), head, query, common.noise_row)
    triton.jit(draw_kernel)[(1,)](*args, common.uniform, BLOCK=keys, **common.FUSED)
    places = (torch.tensor(head), torch.tensor(query), torch.arange(keys))
    places = tuple(place.to(DEVICE) for place in places)
    exact = engine_noise.uniform(seed, 11, *places)
    assert torch.equal(out, exact)
    triton.jit(draw_kernel)[(1,)](*args, common.gumbel, BLOCK=keys, **common.FUSED)
    within(out, engine_noise.gumbel(seed, 11, *places), -(-exact.double().log()).log())


DTYPES = [torch.bool, torch.int8, BF16, torch.int32, FP32, torch.int64, torch.float64]


@pytest.mark.parametrize("page", [1, 5, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_slots_are_copied_bit_by_bit(run: Run, dtype: torch.dtype, page: int) -> None:
    for inner, slot_last in (((), False), ((3, 2), False), ((80,), False), ((80,), True)):
        shape = (7, *inner, page) if slot_last else (7, page, *inner)
        bits = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
        pool = (bits % 2 if dtype == torch.bool else bits).view(dtype).to(DEVICE)
        for slots in (0, 1, min(67, 7 * page)):
            address = torch.randperm(7 * page, device=DEVICE)[:slots]
            given = run("gather_slots", pool, address, slot_last)
            wanted = implementation("gather_slots", "reference")(pool, address, slot_last)
            assert given.shape == wanted.shape and given.dtype == dtype
            assert torch.equal(given.view(torch.uint8), wanted.contiguous().view(torch.uint8))
            target = pool.flip(0)
            moved = target.clone()
            run("scatter_slots", moved, address, given, slot_last)
            implementation("scatter_slots", "reference")(target, address, given, slot_last)
            assert torch.equal(moved.view(torch.uint8), target.view(torch.uint8))


# id: key bits, value bits, widths, kept, page, groups, dtype
PACKED = {
    "K4-V4-D64": (4, 4, (64, 64), (64, 64), 64, (64, 64), FP32),
    "K2-V8-D64-T39": (2, 8, (64, 64), (39, 64), 64, (32, 32), FP32),
    "K8-V2-D80-U48": (8, 2, (80, 80), (80, 48), 128, (128, 32), FP32),
    "K16-V16-D64-T39": (16, 16, (64, 64), (39, 64), 32, (32, 64), FP32),
    "K16-V4-D64-U33-fp16": (16, 4, (64, 64), (64, 33), 64, (64, 64), FP16),
    "K4-V16-D128-T77-bf16": (4, 16, (128, 128), (77, 128), 64, (64, 64), BF16),
}
READ = {**PACKED, "K2-V4-D64-two-codes": (2, 4, (64, 64), (72, 64), 64, (32, 64), FP32)}


@pytest.mark.parametrize("case", PACKED.values(), ids=PACKED)
def test_packed_pages_equal_the_references(run: Run, case: tuple[Any, ...]) -> None:
    key_bits, value_bits, widths, kept, page, groups, dtype = case
    layout = packing.layout_of(key_bits, value_bits, widths, kept, dtype, page, groups)
    part = packing.make_part(layout, [2, 1], dtype, holes=True)
    key, value = part.key_PSD.to(DEVICE), part.value_PSE.to(DEVICE)
    channels = [x.to(DEVICE) for x in part.channels]
    pages = run("pack", key, value, *channels, list(layout))
    assert torch.equal(pages.cpu(), part.tensors[0])
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    given = run("unpack", pages, *channels, list(layout), like)
    wanted = implementation("unpack", "reference")(pages, *channels, list(layout), like)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1.6e-2 if dtype == BF16 else 2e-3, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", READ.values(), ids=READ)
def test_decode_rows_reads_packed_pages(
    run: Run, case: tuple[Any, ...], need_weights: bool
) -> None:
    key_bits, value_bits, widths, kept, page, groups, dtype = case
    layout = packing.layout_of(key_bits, value_bits, widths, kept, dtype, page, groups)
    part = packing.make_part(layout, [11, 0, 1, 2], dtype, holes=need_weights)
    rows = make_rows([3, 17, 30, 1], *widths, 16, dtype)
    query = torch.randn(2, 6, 1, widths[0], device=DEVICE)
    old = Old([x.to(DEVICE) for x in part.tensors], list(layout))
    operands = (query, rows.pages(wild=False), Logits(0.2), need_weights, old)
    given = run("decode_rows", *operands)
    wanted = implementation("decode_rows", "reference")(*operands)
    for one, other in zip(given, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", READ.values(), ids=READ)
def test_chunks_of_packed_pages_equal_the_reference(
    run: Run, case: tuple[Any, ...], need_weights: bool
) -> None:
    key_bits, value_bits, widths, kept, page, groups, dtype = case
    layout = packing.layout_of(key_bits, value_bits, widths, kept, dtype, page, groups)
    part = packing.make_part(layout, [17, 0, 1, 2], dtype, holes=need_weights)
    if part.tensors[5].numel():
        part.tensors[5][part.tensors[3][2, 0].long()] = -1  # the third row has holes alone
    rows = make_rows([3, 0, 520, 1], *widths, 16, dtype)
    query = torch.randn(2, 6, 1 + 6 * need_weights, widths[0], device=DEVICE)
    old = Old([x.to(DEVICE) for x in part.tensors], list(layout))
    operands = (query, rows.pages(wild=False), Logits(0.2), need_weights, old)
    given = run("attend_parts", *operands)
    wanted = implementation("attend_parts", "reference")(*operands)
    for one, other in zip(given, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_channel_scores_equal_the_reference(run: Run, dtype: torch.dtype) -> None:
    query = torch.randn(2, 6, 5, 80, device=DEVICE).to(dtype).transpose(1, 2).contiguous()
    key = torch.randn(2, 2, 1100, 80, device=DEVICE).to(dtype)
    held = torch.rand(2, 2, 1100, device=DEVICE) < 0.8
    held[0, 0] = False
    operands = (query.transpose(1, 2), key, held)
    given = run("channel_scores", *operands)
    wanted = implementation("channel_scores", "reference")(*operands)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (5, 2, 3, 2, 21), (40, 2, 9, 1, 128)], ids=str)
def test_joined_parts_equal_the_reference(run: Run, shape: tuple[int, ...]) -> None:
    out, lse = torch.randn(shape, device=DEVICE), torch.randn(shape[:-1], device=DEVICE) * 9
    nothing = torch.rand(shape[:-1], device=DEVICE) < 0.3
    lse[nothing], out[nothing] = -torch.inf, torch.nan
    given = run("join_parts", out, lse)
    for one, other in zip(given, implementation("join_parts", "reference")(out, lse), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    alone = run("join_parts", out[:, -1:, -1:].contiguous(), lse[:, -1:, -1:].contiguous())
    for one, other in zip(alone, given, strict=True):
        assert torch.equal(one, other[-1:, -1:])


# B, N, H, P, S, D
BLOCK_SHAPES = [(1, 2, 1, 1, 1, 64), (2, 4, 2, 130, 500, 80), (1, 2, 2, 70, 700, 128)]


@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_maps_of_blocks_equal_the_reference_bit_for_bit(run: Run, shape: tuple[int, ...]) -> None:
    query, key, _ = (x.to(DEVICE) for x in blocking.operands(*shape))
    for tau in (0.0, 0.3, float("inf")):
        given = blocking.estimate_operands(query, key, tau)
        given[5][:, -1, 5:9] = -torch.inf
        bits = run("estimate_blocks", *given)
        assert torch.equal(bits, implementation("estimate_blocks", "reference")(*given))
    for bad in (float("nan"), 1e30, -1e30):
        given[4][..., 40:90], given[5][:, :, ::7] = bad, bad
        bits = run("estimate_blocks", *given)
        assert torch.equal(bits, implementation("estimate_blocks", "reference")(*given))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_attention_over_blocks_equals_the_reference(
    run: Run, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    query, key, value = (x.to(DEVICE, dtype) for x in blocking.operands(*shape))
    blocks = Blocks(*shape[3:5])
    computed = torch.rand(*shape[:2], blocks.rows, blocks.columns, device=DEVICE) < 0.5
    bits = to_map(computed & blocks.seen(computed.device), blocks)
    out, lse = run("attend_blocks", query, key, value, bits, 0.1)
    wanted, wanted_lse = implementation("attend_blocks", "reference")(query, key, value, bits, 0.1)
    tolerance = 1e-4 if dtype == FP32 else 2e-2
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-4)
    _, alone = run("attend_blocks", query, key, value[..., :0], bits, 0.1)
    torch.testing.assert_close(alone, lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", ["none", "frozen", "fresh"])
def test_sums_over_blocks_equal_the_reference(run: Run, noise: str) -> None:
    query, key, value = (x.to(DEVICE) for x in blocking.operands(1, 4, 2, 150, 150, 32))
    position = torch.arange(150, device=DEVICE).expand(1, 2, -1)
    blocks = Blocks(150, 150)
    some = torch.rand(1, 4, blocks.rows, blocks.columns) < 0.5
    bits = to_map(some & blocks.seen() | blocks.always(0), blocks).to(DEVICE)
    numbers = (Logits(0.15), Noise(noise, 1.2, 5, 3))
    out, sums = run("attend_sums", query, key, value, position, *numbers, bits)
    wanted = implementation("attend_sums", "reference")
    for one, other in zip(
        (out, sums), wanted(query, key, value, position, *numbers, bits), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU what tensors hold is not checked")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", [*filter(has_triton, calls.MAKERS)])
def test_mutated_calls_are_refused_or_equal_the_reference(run: Run, name: str) -> None:
    for seed in range(40):
        call = calls.some(name, seed)
        given = outcome(name, implementation(name, "triton_kernel"), call)
        wanted = outcome(name, implementation(name, "reference"), call)
        compare(given, wanted, f"{name}, seed {seed}")
