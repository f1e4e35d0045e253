"""The compiled CPU operators against their references, on every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import calls
import packing
import pytest
import torch

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.ops import Bounds, Columns, Logits, Noise, Old, Pages, Reduction, Token

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
rows_reference = ops.implementation("decode_rows", "reference")
pytestmark = pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="no C++ compiler here")


def close(given: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """The tolerance rule: at most twice the error of plain PyTorch, and a little."""
    assert given.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(given[~finite].double(), exact[~finite])
    error = (given.double() - exact)[finite].abs()
    allowed = 2 * float((plain.double() - exact)[finite].abs().max()) if error.numel() else 0.0
    tiny = 2e-6 * max(1.0, float(exact[finite].abs().max()) if error.numel() else 1.0)
    assert not error.numel() or float(error.max()) <= allowed + tiny


def pools(counts: list[int], width: int, value_width: int, page: int, dtype: torch.dtype) -> Pages:
    """Shuffled pages of ragged rows; memory that holds no slot is NaN."""
    room = -(-(max(counts) + 4) // page)
    order = torch.randperm(len(counts) * room, dtype=torch.int32)
    table_RW = order.view(len(counts), room)
    key_PDS = torch.full((len(order), width, page), torch.nan, dtype=dtype)
    value_PSE = torch.full((len(order), page, value_width), torch.nan, dtype=dtype)
    for row, count in enumerate(counts):
        slot_S = torch.arange(count)
        page_S = table_RW[row].long()[slot_S // page]
        key_PDS[page_S, :, slot_S % page] = torch.randn(count, width).to(dtype)
        value_PSE[page_S, slot_S % page] = torch.randn(count, value_width).to(dtype)
    return Pages(key_PDS, value_PSE, table_RW, torch.tensor(counts))


def double(query: torch.Tensor, pages: Pages, logits: Logits) -> Any:
    """`decode_rows` in float64, by lifting the reference's fp32 casts."""
    (key, value, table, counts), (scaling, softcap) = pages, logits
    batch, heads, queries, _ = query.shape
    group = heads * batch // len(counts)
    out = torch.zeros(batch, heads, queries, value.shape[2], dtype=torch.double)
    lse = torch.full((batch, heads, queries), -torch.inf, dtype=torch.double)
    page = key.shape[2]
    for r, count in enumerate(counts.tolist()):
        slot_S = torch.arange(count)
        page_S = table[r].long()[slot_S // page]
        k, v = key[page_S, :, slot_S % page].double(), value[page_S, slot_S % page].double()
        b, h = divmod(r, len(counts) // batch)
        for n in range(h * group, (h + 1) * group):
            for q in range(queries):
                seen = count - queries + q + 1
                if seen > 0:
                    x = k[:seen] @ query[b, n, q].double() * scaling
                    x = torch.tanh(x / softcap) * softcap if softcap else x
                    lse[b, n, q], out[b, n, q] = x.logsumexp(0), x.softmax(0) @ v[:seen]
    return out, lse


# id: group, key width, value width, queries, page, storage, softcap
SHAPES = {
    "G1-D32-Q1-page16": (1, 32, 32, 1, 16, FP32, 0.0),
    "G3-D64-Q1-page16": (3, 64, 64, 1, 16, FP32, 0.0),
    "G3-D64-Q1-page16-bf16": (3, 64, 64, 1, 16, BF16, 0.0),
    "G4-D128-Q1-page64-bf16": (4, 128, 128, 1, 64, BF16, 0.0),
    "G4-D128-Q2-page5": (4, 128, 128, 2, 5, FP32, 30.0),
    "G8-D80-Q7-page16-fp16": (8, 80, 80, 7, 16, FP16, 0.0),
    "G16-D96-Q1-page1": (16, 96, 96, 1, 1, FP32, 0.0),
    "G5-D256-Q3-page48": (5, 256, 256, 3, 48, FP32, 5.0),
    "G2-D64-E72-Q32-page16": (2, 64, 72, 32, 16, FP32, 0.0),
    "G16-D576-E512-Q1-page16": (16, 576, 512, 1, 16, FP32, 0.0),
    "G2-D640-Q2-page16-bf16": (2, 640, 640, 2, 16, BF16, 0.0),
    "G1-D7-E3-Q1-page3": (1, 7, 3, 1, 3, FP32, 0.0),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decode_rows_keeps_the_tolerance_rule(shape: tuple[Any, ...]) -> None:
    group, width, value_width, queries, page, dtype, softcap = shape
    pages = pools([601, 0, 37, 1], width, value_width, page, dtype)
    query = torch.randn(2, queries, 2 * group, width).transpose(1, 2)  # not contiguous
    logits = Logits(width**-0.5, softcap)
    out, lse, weights = ops.decode_rows(query, pages, logits, True)
    plain_out, plain_lse, _ = rows_reference(query, pages, logits, True)
    exact_out, exact_lse = double(query, pages, logits)
    close(out, exact_out, plain_out)
    close(lse, exact_lse, plain_lse)
    sees = (exact_lse > -torch.inf).float()
    torch.testing.assert_close(weights.sum(-1), sees, rtol=1e-5, atol=1e-5)
    assert ops.decode_rows(query, pages, logits, False)[2].numel() == 0


@pytest.mark.parametrize("page", [1, 5, 16, 24, 64])
def test_rows_of_every_length_equal_the_reference(page: int) -> None:
    counts = [1, 15, 16, 17, 63, 64, 65, 129, 150, 300, 511, 512, 513, 577, 700, 1025]
    args = (torch.randn(4, 8, 1, 16), pools(counts, 16, 16, page, FP32), Logits(0.25), True)
    for given, wanted in zip(ops.decode_rows(*args), rows_reference(*args), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch_or_the_threads() -> None:
    pages = pools([1500, 77, 640, 3], 64, 64, 16, FP32)
    query = torch.randn(4, 3, 1, 64)
    together = ops.decode_rows(query, pages, Logits(0.125), True)
    threads = torch.get_num_threads()
    for row in range(4):
        torch.set_num_threads(1 + row % 2)
        one = slice(row, row + 1)
        own = pages._replace(
            table_RW=pages.table_RW[one].contiguous(), counts_R=pages.counts_R[one]
        )
        alone = ops.decode_rows(query[one], own, Logits(0.125), True)
        assert all(torch.equal(a, t[one]) for a, t in zip(alone, together, strict=True))
    torch.set_num_threads(threads)


def columns(pages: Pages, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of `seen` tokens and masses of all slots; memory that holds no slot is NaN."""
    page = pages.key_PDS.shape[2]
    position = torch.full((len(pages.key_PDS), page), -7, dtype=torch.int32)
    mass = torch.full(position.shape, torch.nan)
    for row, count in enumerate(pages.counts_R.tolist()):
        slot_S = torch.arange(count)
        page_S = pages.table_RW[row].long()[slot_S // page]
        position[page_S, slot_S % page] = torch.randperm(seen)[:count].int()
        mass[page_S, slot_S % page] = torch.rand(count)
    return position, mass


# id: storage, page, mass, evict, rank, noise, tau, softcap
STEPS = {
    "mass-fresh": (FP32, 16, True, True, "mass", "fresh", 1.0, 0.0),
    "mass-frozen-tau-page5": (FP32, 5, True, True, "mass", "frozen", 1.7, 0.0),
    "age-none-softcap": (FP32, 16, True, True, "mass_per_age", "none", 1.0, 20.0),
    "age-fresh-tau-bf16": (BF16, 16, True, True, "mass_per_age", "fresh", 0.6, 0.0),
    "position": (FP32, 64, False, True, "position", "none", 1.0, 0.0),
    "observing-only": (FP16, 16, True, False, "mass", "none", 1.3, 0.0),
    "attending-only": (FP32, 16, False, False, "position", "none", 1.0, 0.0),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_decode_steps_equal_the_reference(step: tuple[Any, ...]) -> None:
    dtype, page, massive, evict, rank, noise, tau, softcap = step
    key, value, table, counts = pools([40, 17, 0, 33], 32, 48, page, dtype)
    position, mass = columns(Pages(key, value, table, counts), 50)
    quota, recent = torch.tensor([40, 17, 2, 60]), torch.tensor([3, 20, 1, 9])
    sink = torch.tensor([2, 5])
    sides = [[x.clone() for x in (key, value, position, mass, table, counts)] for _ in range(2)]
    for number in range(4):
        query, new_key = torch.randn(2, 6, 1, 32), torch.randn(2, 2, 1, 32)
        new_value, seen = torch.randn(2, 2, 1, 48), torch.tensor([51, 51]) + number
        outputs = []
        for run, side in zip(
            (ops.decode_step, ops.implementation("decode_step", "reference")), sides, strict=True
        ):
            k, v, p, m, t, c = side
            held = (Pages(k, v, t, c), Columns(p, m if massive else None))
            bounds = Bounds(seen, quota, recent, sink, rank)
            numbers = (Noise(noise, tau, (5 << 32) + 12345, 3, 6), Logits(0.2, softcap))
            token = Token(query, new_key, new_value)
            outputs.append(run(token, *held, bounds, evict, *numbers))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        for given, wanted in zip(*sides, strict=True):
            loose = 1e-4 if given is sides[0][3] else 0.0
            torch.testing.assert_close(given, wanted, rtol=loose, atol=loose, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_steps_of_several_caches_equal_those_of_each(step: tuple[Any, ...], threads: int) -> None:
    dtype, page, massive, evict, rank, noise, tau, softcap = step
    sides: list[list[tuple[Any, ...]]] = [[], []]
    for number, length in enumerate((40, 700, 1, 33, 90)):  # texts of different ages
        pages = pools([length, length // 2], 32, 48, page, dtype)
        position, mass = columns(pages, length)
        token = Token(torch.randn(1, 6, 1, 32), torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 48))
        seen, quota = torch.tensor([length + 1]), torch.tensor([length, 4])
        bounds = Bounds(seen, quota, torch.tensor([3, 1]), torch.tensor([2]), rank)
        numbers = Noise(noise, tau + number / 10, number, 3, 6), Logits(0.2, softcap)
        for side in sides:
            held = Pages(*(x.clone() for x in pages))
            beside = Columns(position.clone(), mass.clone() if massive else None)
            side.append((token, held, beside, bounds, evict and number != 2, *numbers, Old()))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    together = ops.decode_together(sides[0])
    torch.set_num_threads(before)
    assert torch.equal(together, torch.cat([ops.decode_step(*one) for one in sides[1]]))
    for one, other in zip(*sides, strict=True):
        for x, y in zip((*one[1], *one[2]), (*other[1], *other[2]), strict=True):
            assert x is y is None or torch.equal(x.nan_to_num(), y.nan_to_num())


def test_steps_that_are_not_alike_are_refused_and_change_nothing() -> None:
    def step(**bounds: Any) -> tuple[Any, ...]:
        position = torch.randperm(48).view(-1, 16).int()
        token = Token(torch.randn(1, 2, 1, 8), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8))
        long = {"seen_B": [50], "quota_R": [4], "recent_R": [1], "sink_B": [0]} | bounds
        stays = Bounds(*(torch.tensor(x) for x in long.values()), "position")
        held = (pools([20], 8, 8, 16, FP32)._replace(), Columns(position[:2], None))
        return token, *held, stays, True, Noise("none", 1.0, 0, 0), Logits(1.0), Old()

    one, other = step(), step()
    before = one[1].key_PDS.clone()
    massive = Columns(other[2].position_PS, torch.rand(other[2].position_PS.shape))
    wrong = {
        "not alike": [one, (*other[:6], Logits(2.0), Old())],
        "are not alike": [one, (*other[:2], massive, *other[3:])],
        "share memory": [one, (other[0], one[1], *other[2:])],
        "has seen 0 tokens": [one, step(seen_B=[0])],
        "other heads": [one, (Token(torch.randn(1, 3, 1, 8), *other[0][1:]), *other[1:])],
    }
    for message, steps in wrong.items():
        with pytest.raises(OperatorError, match=message):
            ops.decode_together(steps)
    assert torch.equal(one[1].key_PDS.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("noise", ["none", "frozen", "fresh"])
@pytest.mark.parametrize("window", [1, 31, 1000])
@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_attention_sums_equal_the_reference(noise: str, window: int, tau: float) -> None:
    query = torch.randn(2, 300, 6, 40).transpose(1, 2)
    key = torch.randn(2, 331, 2, 40).transpose(1, 2)
    position = torch.arange(331).repeat(2, 2, 1)
    position[1, 0, :9] = -1
    logits = Logits(0.3, 0.0 if window == 31 else 9.0)
    args = (query, key, position, logits, Reduction(window), Noise(noise, tau, 3, 2, 12))
    given = ops.attention_sums(*args)
    wanted = ops.implementation("attention_sums", "reference")(*args)
    torch.testing.assert_close(given, wanted, rtol=2e-5, atol=1e-5)
    assert (given[(position < 0).repeat_interleave(3, 1)] == 0).all()
    torch.testing.assert_close(given.sum(-1), torch.full((2, 6), float(min(window, 300))))


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.int64, torch.int8], ids=str)
@pytest.mark.parametrize("slot_last", [True, False])
def test_slots_move_bit_by_bit(slot_last: bool, dtype: torch.dtype) -> None:
    shape = (9, 5, 16) if slot_last else (9, 16, 5)
    pool = torch.randint(-99, 99, shape).to(dtype)
    address = torch.randperm(9 * 16)[:70]
    slots = ops.gather_slots(pool, address, slot_last)
    assert torch.equal(
        slots, ops.implementation("gather_slots", "reference")(pool, address, slot_last)
    )
    copy = torch.zeros_like(pool)
    ops.scatter_slots(copy, address, slots, slot_last)
    assert torch.equal(ops.gather_slots(copy, address, slot_last), slots)
    assert int((copy != 0).sum()) == int((slots != 0).sum())


def operands() -> dict[str, Any]:
    """A valid call of `decode_rows`."""
    pages = pools([20, 9], 16, 16, 4, FP32)
    numbers = {"scaling": 0.25, "softcap": 0.0, "need_weights": False}
    old: dict[str, Any] = {"tensors": [], "layouts": []}
    return {"query_BNQD": torch.randn(1, 4, 1, 16), **pages._asdict(), **numbers, **old}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_BNQD": torch.randn(1, 4, 1, 8)}, "but D is 8"),
        ({"query_BNQD": torch.randn(4, 1, 16)}, "3 dimensions"),
        ({"query_BNQD": torch.randn(1, 4, 33, 16)}, "1 to 32"),
        ({"query_BNQD": torch.randn(1, 3, 1, 16)}, "divides N"),
        (
            {"query_BNQD": torch.ones(1, 4, 1, 16, dtype=torch.int32)},
            "float32, bfloat16 or float16",
        ),
        ({"counts_R": torch.tensor([25, 9])}, "room for 24"),
        ({"counts_R": torch.tensor([-1, 9])}, "room for 24"),
        ({"counts_R": torch.tensor([3, 9], dtype=torch.int32)}, "int64"),
        ({"table_RW": torch.full((2, 6), 12, dtype=torch.int32)}, "names page 12"),
        ({"table_RW": torch.full((2, 6), -1, dtype=torch.int32)}, "names page -1"),
        ({"softcap": -1.0}, "positive"),
    ],
)
def test_bad_operands_are_refused_by_name(
    change: dict[str, Any], message: str, backend: str
) -> None:
    run = ops.decode_rows if backend == "cpu" else rows_reference
    with pytest.raises(RuntimeError, match=message):
        run(*calls.operands("decode_rows", operands() | change))


def test_wide_heads_and_strides_are_refused() -> None:
    pages = pools([20, 9], 648, 648, 4, FP32)
    with pytest.raises(RuntimeError, match="at most 640"):
        ops.decode_rows(torch.randn(1, 2, 1, 648), pages, Logits(1.0), False)
    wrong = operands()
    wrong["value_PSE"] = wrong["value_PSE"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.decode_rows(*calls.operands("decode_rows", wrong))
    with pytest.raises(RuntimeError, match="address_A names slot"):
        ops.gather_slots(pages.key_PDS, torch.tensor([len(pages.key_PDS) * 4]), True)


def test_operators_pass_opcheck() -> None:
    given = operands()
    rows = calls.operands("decode_rows", given | {"need_weights": True})
    torch.library.opcheck(torch.ops.kvpress.decode_rows.default, calls.flat("decode_rows", *rows))
    query, key = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    position = torch.arange(9).repeat(1, 2, 1)
    args = (query, key, position, 0.3, 0.0, 9, False, None, "fresh", 1.0, 0, 0, 0, None)
    torch.library.opcheck(torch.ops.kvpress.attention_sums.default, args)
    pool, address = given["key_PDS"].nan_to_num(), torch.tensor([3, 0])
    torch.library.opcheck(torch.ops.kvpress.gather_slots.default, (pool, address, True))
    slots = torch.randn(2, 16)
    torch.library.opcheck(torch.ops.kvpress.scatter_slots.default, (pool, address, slots, True))
    layout = list(packing.layout_of(4, 8, (64, 64), (39, 64), FP32))
    part = packing.make_part(packing.PageLayout(*layout), [1, 2], FP32, holes=True)
    packed = (part.key_PSD, part.value_PSE, *part.channels, layout)
    torch.library.opcheck(torch.ops.kvpress.pack.default, packed)
    unpacked = (part.tensors[0], *part.channels, layout, torch.empty(0))
    torch.library.opcheck(torch.ops.kvpress.unpack.default, unpacked)
    held = torch.ones(1, 2, 9, dtype=torch.bool)
    torch.library.opcheck(torch.ops.kvpress.channel_scores.default, (query, key, held))


OLDER = ("test_cpu.py", "test_join_parts.py", "test_match_keys.py", "test_packed.py")
OLDER += ("test_attend_parts.py",)


@pytest.mark.parametrize("instructions", ["avx2", "portable"])
def test_older_processors_get_the_same_results(
    instructions: str, request: pytest.FixtureRequest
) -> None:
    if os.environ.get("KVPRESS_CPU"):
        pytest.skip("already inside")
    cases = request.config.getoption("--cases")
    files = [str(Path(__file__).with_name(name)) for name in OLDER]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += [] if cases is None else [f"--cases={cases}"]
    done = subprocess.run(
        command, env={**os.environ, "KVPRESS_CPU": instructions}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_backend_that_cannot_run_says_why() -> None:
    program = "from kvpress import ops; ops.backends()"
    for variables, message in (
        ({"KVPRESS_BACKEND": "cpu", "CXX": "no-such-compiler"}, "No C++ compiler was found"),
        ({"KVPRESS_BACKEND": "gpu"}, "names no backend"),
        ({"KVPRESS_BACKEND": "triton", "TRITON_INTERPRET": "0"}, "cannot run"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
        )
        if message == "cannot run" and torch.cuda.is_available():
            continue
        assert done.returncode != 0 and message in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", program + "; print(ops.backends()['cpu'])"],
        env={**os.environ, "CXX": "no-such-compiler", "KVPRESS_BACKEND": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "reference: No C++ compiler" in done.stdout
    assert not done.stderr  # it is said where an operator is used; see test_folders.py
