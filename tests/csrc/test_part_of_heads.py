"""Noise of some of the heads of a model is a part of that of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpress import ops
from kvpress.formulas.sums import Observation, step_sums
from kvpress.ops import Bounds, Columns, Logits, Noise, Pages, Reduction
from kvpress.ops.operands import Token

BACKENDS = ("reference", "device")


def operator(name: str, backend: str) -> Any:
    return getattr(ops, name) if backend == "device" else ops.implementation(name, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("noise", ["frozen", "fresh"])
def test_sums_of_a_prompt(noise: str, backend: str) -> None:
    run = operator("attention_sums", backend)
    query_BNQD, key_BHSD = torch.randn(2, 12, 40, 16), torch.randn(2, 4, 40, 16)
    position_BHS, numbers = torch.arange(40).repeat(2, 4, 1), (Logits(0.3), Reduction(40))
    whole = run(query_BNQD, key_BHSD, position_BHS, *numbers, Noise(noise, 1.3, 9, 2))
    for first, heads in ((0, 1), (1, 3)):
        queries = slice(first * 3, (first + heads) * 3)
        part = [x[:, first : first + heads] for x in (key_BHSD, position_BHS)]
        draw = Noise(noise, 1.3, 9, 2, first * 3)
        given = run(query_BNQD[:, queries], *part, *numbers, draw)
        torch.testing.assert_close(given, whole[:, queries])


@pytest.mark.parametrize("backend", BACKENDS)
def test_masses_of_a_step(backend: str) -> None:
    """Of two KV heads with two query heads each, and of the second one alone."""
    masses = []
    query, key, value = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    key_PDS, value_PSE = torch.randn(4, 8, 4), torch.randn(4, 4, 8)
    for first in (0, 1):
        rows = 2 - first
        table = torch.arange(4).view(2, 2)[first:].int().contiguous()
        pages = Pages(key_PDS.clone(), value_PSE.clone(), table, torch.full((rows,), 5))
        position = torch.arange(8).repeat(2).view(4, 4).int()
        columns = Columns(position, torch.zeros(4, 4))
        bounds = Bounds(*map(torch.tensor, ([6], [9] * rows, [1] * rows, [0])), "mass")
        token = Token(query[:, 2 * first :], key[:, first:], value[:, first:])
        draw = Noise("fresh", 1.2, 7, 1, 2 * first)
        step = operator("decode_step", backend)
        step(token, pages, columns, bounds, False, draw, Logits(0.3))
        masses.append(columns.mass_PS[2:])
    torch.testing.assert_close(*masses)
    assert masses[0].sum() > 0


def test_sums_of_a_step() -> None:
    weights_BNS = torch.rand(2, 6, 20).softmax(-1)
    position_BHS, seen_B = torch.arange(20).repeat(2, 3, 1), torch.tensor([20, 20])
    draw = Observation(noise="fresh", tau=1.1, seed=3)
    whole = step_sums(weights_BNS, position_BHS, seen_B, 4, draw)
    part = step_sums(weights_BNS[:, 4:], position_BHS[:, 2:], seen_B, 4, draw, 4)
    assert torch.equal(part, whole[:, 2:])
