"""What no operator may accept: sizes that overflow, slots that do not exist, numbers that are none.

Every backend refuses the same, as OperatorError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import calls
import packing
import pytest
import torch

from kvpress import ops
from kvpress.errors import OperatorError
from kvpress.ops import Logits, Noise, Reduction

FP32 = torch.float32
MOST = 2**63 - 1
NAN = float("nan")
Run = Callable[..., Any]
BACKENDS = pytest.mark.parametrize("backend", ["operator", "reference"])


def run_of(backend: str, name: str) -> Run:
    return getattr(ops, name) if backend == "operator" else ops.implementation(name, "reference")


def refused(backend: str, name: str, call: dict[str, Any], message: str) -> None:
    with pytest.raises(OperatorError, match=message):
        run_of(backend, name)(*calls.operands(name, call))


def valid(name: str) -> dict[str, Any]:
    """A call that is accepted, without empty operands and old slots."""
    for seed in range(1000):
        torch.manual_seed(seed)
        call = calls.MAKERS[name](calls.Maker(seed))
        sizes = [x.numel() for x in call.values() if isinstance(x, torch.Tensor)]
        maps = call.get("map_BNX") is not None and name != "attend_blocks"
        if min(sizes) > 0 and not call.get("tensors") and not maps:
            return call
    raise AssertionError(name)


@BACKENDS
@pytest.mark.parametrize("name", ["decode_rows", "attend_parts", "decode_step", "absorb_step"])
@pytest.mark.parametrize("count", [MOST, MOST - 1, 2**62, -1, -(2**63)])
def test_counts_near_the_largest_number(name: str, count: int, backend: str) -> None:
    call = valid(name)
    call["counts_R"][0] = count
    refused(backend, name, call, "room for")


@BACKENDS
@pytest.mark.parametrize("name", ["decode_rows", "attend_parts", "decode_step", "absorb_step"])
def test_pages_of_no_slots(name: str, backend: str) -> None:
    call = valid(name)
    pages, width, _ = call["key_PDS"].shape
    call["key_PDS"] = torch.zeros(pages, width, 0)
    call["value_PSE"] = torch.zeros(pages, 0, call["value_PSE"].shape[2])
    call["counts_R"].zero_()
    for column in ("position_PS", "mass_PS"):
        if call.get(column) is not None:
            call[column] = call[column][:, :0]
    refused(backend, name, call, "S is 0")


@BACKENDS
@pytest.mark.parametrize("slots", [2**31, 2**40, 2**55])
def test_more_slots_than_can_be_numbered(slots: int, backend: str) -> None:
    call = valid("decode_rows")
    width, value_width = call["key_PDS"].shape[1], call["value_PSE"].shape[2]
    call["counts_R"].zero_()
    call["key_PDS"] = torch.empty(0, width, slots)
    call["value_PSE"] = torch.empty(0, slots, value_width)
    call["query_BNQD"], call["need_weights"] = call["query_BNQD"].float(), True
    refused(backend, "decode_rows", call, "at most 2147483647")


@BACKENDS
@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize("size", [MOST, 2**62, 2**32, 0, -64])
def test_layouts_whose_bytes_cannot_be_counted(index: int, size: int, backend: str) -> None:
    call = calls.pack(calls.Maker(0))
    call["layout"][index] = size
    refused(backend, "pack", call, "layout|Layout|S, D, E, C, U")


@BACKENDS
@pytest.mark.parametrize("value_group", [MOST - 31, 2**62])
def test_groups_that_overflow(value_group: int, backend: str) -> None:
    call = calls.unpack(calls.Maker(0))
    call["layout"][8] = value_group
    refused(backend, "unpack", call, "layout|Layout")


@BACKENDS
@pytest.mark.parametrize("sizes", [9, 11, 0])
def test_layouts_of_other_sizes(sizes: int, backend: str) -> None:
    call = calls.pack(calls.Maker(0))
    call["layout"] = (call["layout"] * 2)[:sizes]
    refused(backend, "pack", call, f"layout has {sizes} sizes")


def old_call() -> dict[str, Any]:
    layout = packing.layout_of(4, 16, (16, 16), (9, 12), FP32, 64, (32, 32))
    part = packing.make_part(layout, [2, 1], FP32, holes=True)
    pools = {"key_PDS": torch.randn(2, 16, 4), "value_PSE": torch.randn(2, 4, 16)}
    rows = {"table_RW": torch.arange(2).view(2, 1).int(), "counts_R": torch.tensor([3, 1])}
    numbers = {"scaling": 0.3, "softcap": 0.0, "need_weights": False}
    old = {"tensors": part.tensors, "layouts": list(layout)}
    return {"query_BNQD": torch.randn(1, 2, 1, 16), **pools, **rows, **numbers, **old}


@BACKENDS
@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (1, -1, "channel -1 of 16"),
        (2, -32768, "channel -32768 of 16"),
        (1, 16, "channel 16 of 16"),
        (2, 15, "ascend"),
        (3, -1, "page -1"),
        (3, 99, "page 99"),
        (4, 63, "whole pages"),
        (4, 65, "whole pages"),
        (4, -64, "room for"),
        (4, MOST, "room for"),
        (4, MOST - 63, "room for"),
        (7, -1, "dropped"),
        (7, 129, "dropped"),
    ],
)
def test_old_slots_that_cannot_be(tensor: int, value: int, message: str, backend: str) -> None:
    call = old_call()
    call["tensors"][7] = torch.zeros(2, dtype=torch.int64)
    call["tensors"][tensor].view(-1)[0] = value
    refused(backend, "decode_rows", call, message)


@BACKENDS
def test_kept_channels_of_packed_pages_exist_and_ascend(backend: str) -> None:
    for name, make in (("pack", calls.pack), ("unpack", calls.unpack)):
        for bad in (-1, 99, -32768):
            call = make(calls.Maker(0))
            call["channel_PC"][0, 0] = bad
            refused(backend, name, call, f"channel {bad} of")
        call = make(calls.Maker(0))
        call["channel_PU"] = call["channel_PU"].flip(1).contiguous()
        assert call["channel_PU"].shape[1] > 1
        refused(backend, name, call, "ascend")


@BACKENDS
@pytest.mark.parametrize("start", [MOST, MOST - 1, 2**62, -1])
def test_a_start_of_channels_that_overflows(start: int, backend: str) -> None:
    call = valid("absorb_step")
    call |= {"frequency_F": torch.rand(1), "keys": "unrotated", "start": start}
    refused(backend, "absorb_step", call, "do not fit")


@BACKENDS
@pytest.mark.parametrize("number", [NAN, float("inf"), -1.0, 1e-300, 1e300])
@pytest.mark.parametrize(
    "name",
    [
        *("decode_rows", "attend_parts", "decode_step", "absorb_step"),
        *("attention_sums", "attend_sums", "attend_blocks"),
    ],
)
def test_numbers_with_which_logits_are_none(name: str, number: float, backend: str) -> None:
    call = valid(name) | ({"fixed": None} if name == "absorb_step" else {})
    for argument in {"softcap", "tau", "scaling"} & set(call):
        if argument == "scaling" and abs(number) <= 1:
            continue
        refused(backend, name, {**call, argument: number}, f"{argument} is")
    for argument in {"own", "memory", "gain"} & set(call):
        if not abs(number) <= 1:
            refused(backend, name, {**call, argument: number}, "own, memory")


@BACKENDS
def test_empty_slots_of_a_whole_prompt(backend: str) -> None:
    call = valid("attend_sums")
    for position in (-1, 2**31, MOST, -(2**63)):
        call["position_BHS"][0, 0, 0] = position
        refused(backend, "attend_sums", dict(call), "holds a token")
    call = valid("attention_sums")
    call["position_BHS"][0, 0, 0] = 2**31  # as 32 bits it would be an empty slot
    refused(backend, "attention_sums", call, "2147483648")


@BACKENDS
def test_a_query_that_sees_no_slot_adds_nothing(backend: str) -> None:
    query, key = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8)
    position = torch.tensor([[[-1, 5, 9]]])
    for noise in ("none", "frozen", "fresh"):
        numbers = (Logits(0.3), Reduction(3), Noise(noise, 1.0, 1, 0))
        sums = run_of(backend, "attention_sums")(query, key, position, *numbers)
        assert sums[..., 0] == 0 and float(sums.sum()) == pytest.approx(2)
        numbers = (Logits(0.3), Reduction(3), Noise(noise, 0.7, 1, 0))
        sums = run_of(backend, "attention_sums")(query, key, position.clamp_max(-1), *numbers)
        assert torch.equal(sums, torch.zeros_like(sums))


@BACKENDS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sink_B": -1}, "0 to 2147483647 are allowed"),
        ({"sink_B": MOST}, "0 to 2147483647 are allowed"),
        ({"seen_B": -(2**63)}, "seen"),
        ({"seen_B": 2**31}, "seen"),
        ({"recent_R": -1}, "negative"),
    ],
)
@pytest.mark.parametrize("name", ["decode_step", "absorb_step"])
def test_ages_that_cannot_be(name: str, change: dict[str, int], message: str, backend: str) -> None:
    call = valid(name)
    for key, value in change.items():
        call[key][-1] = value
    refused(backend, name, call, message)


@BACKENDS
@pytest.mark.parametrize("name", ["decode_step", "absorb_step"])
def test_memory_that_is_written_is_no_other_operands(name: str, backend: str) -> None:
    call = valid(name)
    call["quota_R"] = call["counts_R"]
    refused(backend, name, call, "share memory")
    pool = torch.randn(4, 3, 2)
    moved = {"pool_PX": pool, "address_A": torch.tensor([0, 4])}
    moved |= {"slots_AX": pool[0, 1:], "slot_last": False}
    refused(backend, "scatter_slots", moved, "share memory")


@BACKENDS
def test_codes_whose_sums_do_not_fit(backend: str) -> None:
    for argument, code in (("query_BNQD", 8), ("key_BHSD", -8), ("key_BHSD", -128)):
        call = valid("estimate_blocks")
        call[argument][0, 0, 0, 0] = code
        refused(backend, "estimate_blocks", call, "codes")


@BACKENDS
def test_slots_of_numbers_that_are_too_large(backend: str) -> None:
    pool = torch.zeros(3, 4, 2, dtype=torch.complex128)
    call = {"pool_PX": pool, "address_A": torch.tensor([1]), "slot_last": False}
    refused(backend, "gather_slots", call, "16 bytes")
    call["slots_AX"] = torch.zeros(1, 2, dtype=pool.dtype)
    refused(backend, "scatter_slots", call, "16 bytes")


@BACKENDS
def test_a_pool_of_more_slots_than_memory(backend: str) -> None:
    pool = torch.empty(2**31, 2**31, 0)
    address = torch.tensor([2**62])
    with pytest.raises(OperatorError):
        run_of(backend, "gather_slots")(pool, address, False)


def test_the_words_of_the_schema_are_operator_errors() -> None:
    with pytest.raises(OperatorError, match="argument 'address_A'"):
        ops.gather_slots(torch.zeros(2, 2), 3, False)
    for missing in ((None, torch.tensor([0])), (torch.zeros(2, 2), None)):
        with pytest.raises(OperatorError, match="None"):
            ops.gather_slots(*missing, False)
