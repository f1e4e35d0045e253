"""`absorb_step`: every backend against a loop in float64 that follows the README line by line."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import calls
import pytest
import torch

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.formulas.merging import Merging
from kvpress.ops import Bounds, Columns, Pages, Turning
from kvpress.ops.registry import implementation

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NAN = math.nan
OWN = math.e


@pytest.fixture(scope="module", params=["reference", "cpu", "triton"])
def run(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """The operator of one backend, on the CPU."""
    if request.param == "cpu" and ops.backends()["cpu"] != "cpu":
        pytest.skip("no C++ compiler here")
    if request.param == "reference":
        yield implementation("absorb_step", "reference")
    elif request.param == "cpu":
        yield ops.absorb_step
    else:
        yield from _interpreted()


def _interpreted() -> Iterator[Callable[..., None]]:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _forget()
        yield implementation("absorb_step", "triton_kernel")
    _forget()


def _forget() -> None:
    for name in [n for n in sys.modules if n.startswith("kvpress.csrc.") and "triton" in n]:
        del sys.modules[name]
    for name in ("triton.language.standard", "triton.language"):
        importlib.reload(importlib.import_module(name))


class Rows:
    """Ragged rows of two heads per sequence, in shuffled pages; what holds no slot is NaN."""

    def __init__(self, counts: list[int], width: int, page: int, dtype: torch.dtype) -> None:
        room, rows = -(-max(counts) // page) + 1, len(counts)
        order = torch.randperm(rows * room, dtype=torch.int32)
        self.table, self.counts = order.view(rows, room), torch.tensor(counts)
        self.key = torch.full((len(order), width, page), NAN, dtype=dtype)
        self.value = torch.full((len(order), page, width + 8), NAN, dtype=dtype)
        self.position = torch.full((len(order), page), -7, dtype=torch.int32)
        self.mass = torch.full((len(order), page), NAN)
        self.seen = torch.tensor([2 * max(counts)] * (rows // 2))
        self.page = page
        for row, count in enumerate(counts):
            at = self.at(row, torch.arange(count))
            self.key[at[0], :, at[1]] = torch.randn(count, width).to(dtype)
            self.value[at] = torch.randn(count, width + 8).to(dtype)
            self.mass[at] = torch.rand(count)
            taken = torch.randperm(2 * max(counts))[:count].int()
            self.position[at] = taken

    def at(self, row: int, slot: Any) -> tuple[torch.Tensor, torch.Tensor]:
        slot = torch.as_tensor(slot)
        return self.table[row].long()[slot // self.page], slot % self.page

    def stored(self, quota: list[int], o: dict[str, Any]) -> tuple[Pages, Columns, Bounds]:
        """The store as operators take it."""
        recent = torch.as_tensor(o["recent"]).expand(len(self.counts)).contiguous()
        sink = torch.as_tensor(o["sink"]).expand(len(self.seen)).contiguous()
        return (
            Pages(self.key, self.value, self.table, self.counts),
            Columns(self.position, self.mass),
            Bounds(self.seen, torch.tensor(quota), recent, sink, o["rank"]),
        )

    def dense(self, row: int) -> dict[str, torch.Tensor]:
        at = self.at(row, torch.arange(int(self.counts[row])))
        return {
            "key": self.key[at[0], :, at[1]].double(),
            "value": self.value[at].double(),
            "position": self.position[at].long(),
            "mass": self.mass[at],
        }

    def copy(self) -> Rows:
        other = object.__new__(Rows)
        for name, value in vars(self).items():
            setattr(other, name, value.clone() if isinstance(value, torch.Tensor) else value)
        return other


DEFAULTS: dict[str, Any] = {
    "sink": 4,
    "recent": 5,
    "rank": "mass",
    "threshold": [NAN, 0.4],
    "frequency": None,
    "interleaved": False,
    "start": 0,
    "extra": 0,
    "own": OWN,
    "memory": 0.3,
    "gain": 0.7,
    "largest": True,
    "normalised": True,
    "together": False,
    "fixed": None,
    "keys": "unrotated",
    "sinks": False,
    "counts": False,
}


def call(operator: Callable[..., None], rows: Rows, quota: list[int], o: dict[str, Any]) -> Any:
    threshold = torch.tensor(o["threshold"])
    operator(
        *rows.stored(quota, o),
        threshold,
        Turning(o["frequency"], o["interleaved"], o["start"]),
        rows.key.shape[1] - o["extra"],
        Merging(**{name: o[name] for name in Merging._fields}),
    )
    return threshold


def turned(key: torch.Tensor, by: int, o: dict[str, Any]) -> torch.Tensor:
    """A key at another position, by complex numbers."""
    if o["frequency"] is None:
        return key
    pairs, start, out = len(o["frequency"]), o["start"], key.clone()
    for f, frequency in enumerate(o["frequency"].tolist()):
        a, b = (2 * f, 2 * f + 1) if o["interleaved"] else (f, f + pairs)
        z = complex(key[start + a], key[start + b]) * complex(
            math.cos(by * frequency), math.sin(by * frequency)
        )
        out[start + a], out[start + b] = z.real, z.imag
    return out


def expected(rows: Rows, quota: list[int], o: dict[str, Any]) -> tuple[Any, list[float]]:
    """The rows afterwards, as dense columns in any order by position, and the thresholds."""
    dense = [rows.dense(r) for r in range(len(rows.counts))]
    width, thresholds = rows.key.shape[1] - o["extra"], []
    for b, before in enumerate(o["threshold"]):
        losses = []
        for r in (2 * b, 2 * b + 1):
            d, now = dense[r], int(rows.seen[b])
            sink, recent = (torch.as_tensor(o[n]).flatten() for n in ("sink", "recent"))
            sink, recent = int(sink[b % len(sink)]), int(recent[r % len(recent)])
            open_S = (d["position"] >= sink) & (d["position"] < now - recent)
            if int(rows.counts[r]) <= quota[r] or not open_S.any():
                continue
            rank = {
                "mass": d["mass"],
                "mass_per_age": d["mass"] / (now - d["position"]),
                "position": d["position"].float(),
            }[o["rank"]]
            victim = int(rank.masked_fill(~open_S, math.inf).argmin())
            others = torch.arange(len(open_S)) != victim
            if not o["sinks"]:
                others &= d["position"] >= sink
            target, u = None, math.nan
            if others.any():
                cosines = torch.cosine_similarity(
                    d["key"][:, :width], d["key"][victim, :width][None], dim=1
                ).masked_fill(~others, -math.inf)
                target, u = int(cosines.argmax()), float(cosines.max())
            losses.append((r, victim, target, u))
        us = [u for *_, target, u in losses if target is not None]
        mean = sum(us) / max(1, len(us))
        after = before
        if us:
            news = max(us) if o["largest"] else mean
            after = mean if math.isnan(before) else o["memory"] * before + o["gain"] * news
        thresholds.append(after)
        for r, victim, target, u in losses:
            d = dense[r]
            if target is not None and (mean if o["together"] else u) >= after - 1e-7:
                w = math.exp(u) if o["normalised"] else u
                own = o["own"] if o["normalised"] else 1.0
                whole = own + w if o["normalised"] else 2.0
                d["value"][target] = (own * d["value"][target] + w * d["value"][victim]) / whole
                by = int(d["position"][target] - d["position"][victim])
                lost = turned(d["key"][victim, :width], by, o)
                if o["keys"] != "values_only":
                    d["key"][target, :width] = (own * d["key"][target, :width] + w * lost) / whole
                if o["counts"]:
                    total = d["key"][target, -1].exp() + d["key"][victim, -1].exp()
                    d["key"][target, -1] = total.log()
            stays = torch.arange(len(d["mass"])) != victim
            dense[r] = {name: x[stays] for name, x in d.items()}
    return dense, thresholds


def check(run: Callable[..., None], rows: Rows, quota: list[int], **options: Any) -> Rows:
    o = DEFAULTS | options
    wanted, thresholds = expected(rows, quota, o)
    given = rows.copy()
    threshold = call(run, given, quota, o)
    torch.testing.assert_close(
        threshold, torch.tensor(thresholds), rtol=1e-5, atol=1e-6, equal_nan=True
    )
    half = rows.key.dtype != FP32
    for r, want in enumerate(wanted):
        have = given.dense(r)
        order, ours = want["position"].argsort(), have["position"].argsort()
        assert torch.equal(have["position"][ours], want["position"][order])
        assert torch.equal(have["mass"][ours], want["mass"][order])
        for name in ("key", "value"):
            close = {"rtol": 1e-2, "atol": 1e-2} if half else {"rtol": 2e-5, "atol": 2e-6}
            torch.testing.assert_close(have[name][ours], want[name][order], **close)
    return given


FREQUENCY = torch.tensor([1.0, 0.3, 0.05, 0.001])
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "official": {
        "largest": False,
        "normalised": False,
        "together": True,
        "memory": 0.5,
        "gain": 0.5,
        "sinks": True,
    },
    "own-0.1": {"own": 0.1},
    "values-only": {"keys": "values_only"},
    "turned": {"frequency": FREQUENCY, "threshold": [-1.0, -1.0]},
    "turned-interleaved-start": {
        "frequency": FREQUENCY,
        "interleaved": True,
        "start": 5,
        "threshold": [-1.0, NAN],
    },
    "counts": {"counts": True, "extra": 1, "threshold": [-1.0, -1.0]},
    "extra-channels": {"extra": 3},
    "by-age": {"rank": "mass_per_age"},
    "by-position": {"rank": "position", "sinks": True},
    "protected-by-row": {"sink": [1, 6], "recent": [0, 30, 7, 2], "largest": False},
    "never": {"threshold": [2.0, 2.0], "memory": 1.0, "gain": 0.0},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_rule_equals_the_loop(run: Any, options: dict[str, Any]) -> None:
    rows = Rows([70, 70, 33, 70], 24, 16, FP32)
    check(run, rows, [69, 69, 33, 69], **options)


@pytest.mark.parametrize("page", [1, 5, 16, 64])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_every_page_and_storage_equals_the_loop(run: Any, page: int, dtype: torch.dtype) -> None:
    rows = Rows([131, 20, 64, 65], 12, page, dtype)
    check(run, rows, [130, 19, 63, 64], threshold=[-1.0, NAN])


def test_rows_without_a_victim_or_a_target_keep_the_threshold(run: Any) -> None:
    rows = Rows([9, 9, 9, 9], 8, 4, FP32)
    protected = check(run, rows, [5] * 4, recent=18)  # every slot is recent
    assert torch.equal(protected.counts, rows.counts)
    lonely = Rows([1, 1, 1, 1], 8, 4, FP32)
    gone = check(run, lonely, [0] * 4, sink=0, recent=0)
    assert gone.counts.tolist() == [0] * 4


def test_zero_norms_have_the_cosine_zero_and_ties_go_to_the_lowest_slot(run: Any) -> None:
    rows = Rows([6, 6], 4, 4, FP32)
    rows.mass[rows.at(0, 2)], rows.mass[rows.at(1, 2)] = -1.0, -1.0  # the victims
    page, offset = rows.at(0, torch.arange(6))
    rows.key[page, :, offset] = torch.tensor([-1.0, 1, 0, 1, 1, -1])[:, None].expand(6, 4)
    page, offset = rows.at(1, torch.arange(6))
    rows.key[page, :, offset] = torch.tensor([3.0, 1, 2, 1, 5, 1])[:, None].expand(6, 4)
    options = DEFAULTS | {"sink": 0, "recent": 0, "sinks": True, "threshold": [-1.0]}
    options |= {"memory": 1.0, "gain": 0.0}
    before = rows.copy()
    call(run, rows, [5, 5], options)
    # Row 0: the victim has norm 0, u = 0 with everybody: slot 0 gets it. Row 1: all are parallel.
    for r, u in ((0, 0.0), (1, 1.0)):
        share = math.exp(u) / (math.e + math.exp(u))
        old, lost = (before.value[before.at(r, s)].float() for s in (0, 2))
        mixed = old * (1 - share) + lost * share
        torch.testing.assert_close(rows.value[rows.at(r, 0)], mixed, rtol=1e-5, atol=1e-6)
        for slot in (1, 3, 4):
            assert torch.equal(rows.value[rows.at(r, slot)], before.value[before.at(r, slot)])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, where Triton is interpreted
def test_keys_that_are_not_finite_match_nothing(run: Any) -> None:
    rows = Rows([6, 6], 4, 4, FP32)
    rows.mass[rows.at(0, 2)], rows.mass[rows.at(1, 2)] = -1.0, -1.0  # the victims
    page, offset = rows.at(0, torch.tensor([0]))
    rows.key[page, :, offset] = NAN
    page, offset = rows.at(1, torch.tensor([2]))
    rows.key[page, :, offset] = math.inf
    before, o = rows.copy(), DEFAULTS | {"sink": 0, "recent": 0, "threshold": [-1.0]}
    call(run, rows, [5, 5], o | {"memory": 1.0, "gain": 0.0})
    assert torch.equal(rows.value[rows.at(0, 0)], before.value[before.at(0, 0)])
    for slot in (0, 1, 3, 4):  # nobody got the infinite one
        assert torch.equal(rows.value[rows.at(1, slot)], before.value[before.at(1, slot)])
    assert rows.counts.tolist() == [5, 5]


def test_a_sequence_does_not_depend_on_its_batch(run: Any) -> None:
    rows = Rows([40, 41, 300, 7], 16, 16, FP32)
    together, o = rows.copy(), DEFAULTS | {"threshold": [0.2, NAN]}
    both = call(run, together, [39, 40, 299, 7], o)
    alone = rows.copy()
    alone.table, alone.counts, alone.seen = rows.table[2:], rows.counts[2:].clone(), rows.seen[1:]
    own = call(run, alone, [299, 7], o | {"threshold": [NAN]})
    assert torch.equal(own[0], both[1])
    for r in range(2):
        for name, x in alone.dense(r).items():
            assert torch.equal(x, together.dense(r + 2)[name])


def test_bad_operands_are_refused_by_name(run: Any) -> None:
    rows = Rows([9, 9], 8, 4, FP32)
    o = DEFAULTS | {"threshold": [NAN]}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"threshold": [NAN, NAN]}, "threshold_B has shape|but B is"),
        ({"rank": "votes"}, "rank='votes' is unknown"),
        ({"extra": 8}, "width is 0"),
        ({"counts": True}, "1 of counts"),
        ({"frequency": FREQUENCY, "start": 1}, "do not fit"),
        ({"frequency": FREQUENCY, "keys": "values_only"}, "keys are not merged"),
    ]
    for options, message in refused:
        with pytest.raises((OperatorError, RuntimeError), match=message):
            call(run, rows.copy(), [8, 8], o | options)
    rows.table[0, 0] = 99
    with pytest.raises((OperatorError, RuntimeError), match="99"):
        call(run, rows, [8, 8], o)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="as the suite runs it")
def test_opcheck() -> None:
    rows, threshold = Rows([9, 9], 8, 4, FP32), torch.tensor([NAN])
    groups = (*rows.stored([8, 8], DEFAULTS), threshold, Turning(), 8, Merging(OWN, 0.3, 0.7))
    torch.library.opcheck(torch.ops.kvpress.absorb_step.default, calls.flat("absorb_step", *groups))
