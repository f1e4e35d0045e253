"""The memory model of SpeContext: golden values of its formula, and thresholds that increase."""

from __future__ import annotations

import pytest

from kvpress.formulas.memory_model import MemoryModel

GIGABYTE = 10**9
LLAMA_8B = MemoryModel(16_060_000_000 + 60_000_000, 32, 32, 8, 128, budget=2048)
LLAMA_1B = MemoryModel(2_500_000_000 + 60_000_000, 1, 16, 8, 64, budget=2048)


def test_golden_values_of_an_8b_model() -> None:
    found = LLAMA_8B.thresholds(80 * GIGABYTE)
    wanted = {0: 12174, 1: 12456, 8: 14968, 16: 19890, 31: 64496, 32: 76986}
    assert {away: found[away] for away in wanted} == wanted


def test_golden_values_of_a_1b_model() -> None:
    found = LLAMA_1B.thresholds(4 * GIGABYTE)
    assert {away: found[away] for away in (0, 8, 16)} == {0: 15625, 8: 23980, 16: 59071}


@pytest.mark.parametrize("gigabytes", [24, 30, 80, 141])
def test_thresholds_increase_where_the_budget_is_below_the_first(gigabytes: int) -> None:
    for budget in (128, 512, 2048, 4096):
        found = LLAMA_8B._replace(budget=budget).thresholds(gigabytes * GIGABYTE)
        if budget < found[0]:
            assert found == sorted(set(found))


def test_a_threshold_is_the_last_length_that_fits() -> None:
    memory = 80 * GIGABYTE
    for away, tokens in enumerate(LLAMA_8B.thresholds(memory)):
        assert LLAMA_8B.bytes(tokens, away) <= memory < LLAMA_8B.bytes(tokens + 1, away)


def test_a_model_that_does_not_fit_has_no_threshold() -> None:
    assert set(LLAMA_8B.thresholds(20 * GIGABYTE)) == {0}
