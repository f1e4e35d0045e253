"""Scores predicted from keys and values: counts by a threshold, and by a budget beside one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.errors import PolicyError
from kvpress.formulas.ridge import features
from kvpress.formulas.shares import FRACTIONS
from kvpress.hf import learned
from kvpress.hf.rotation_probe import rotations
from kvpress.policy import Pool
from kvpress.policy.loading import load_policy

TOKENS = 60
GUARDED = {0, 1, 2, 3, TOKENS - 1}
# ln s of all slots of a row, in three layers of two heads: the matrices of the worked example.
LEVELS = [[-2.0, -6.0], [-5.0, -3.0], [-9.0, -4.5]]


@pytest.fixture
def model() -> Any:
    return helpers.sharp("llama")


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    ridge_LXH = torch.randn(3, 69, 2, generator=torch.Generator().manual_seed(0)) / 8
    return write(model, tmp_path / "heads.safetensors", ridge_LXH)


def write(model: Any, path: Path, ridge_LXH: torch.Tensor) -> Path:
    share_LHX = torch.tensor(FRACTIONS).expand(3, 2, -1).contiguous()
    tensors = {"share_LHX": share_LHX, "ridge_LXH": ridge_LXH}
    learned.write(path, model, "heads", learned.Learned(tensors, {}, 1, True))
    return path


@torch.no_grad()
def read(engine: Any, ids: torch.Tensor, pieces: Sequence[int]) -> Any:
    cache, start = engine.new_cache(), 0
    for new in pieces:
        engine.model(ids[:, start : start + new], past_key_values=cache)
        start += new
    assert cache.check_integrity()
    return cache


def predicted(model: Any, file: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """ln s of all tokens: of every layer `[H, T]`."""
    ridge_LXH = learned.read(file, model, "heads").tensors["ridge_LXH"]
    with kvpress.attach(model, "full") as engine:
        states = read(engine, ids, [ids.shape[1]]).states
    made = []
    for state, turn, weight_XH in zip(states, rotations(model), ridge_LXH, strict=True):
        own = state.rows.dense_by_position([0])
        x = features(own["key"], own["value"], own["position"].long(), turn)
        made.append((x @ weight_XH)[0].mT)
    return made


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("threshold=-4", [[60, 5], [5, 60], [5, 5]]),
        ("threshold=-4.75", [[60, 5], [5, 60], [5, 60]]),
        ("threshold=-1", [[5, 5], [5, 5], [5, 5]]),
        ("threshold=-10", [[60, 60], [60, 60], [60, 60]]),
        ("threshold=-1,sink=0,recent=0", [[1, 1], [1, 1], [1, 1]]),
        # At most 15 a row: 60 places beside the protected slots, the largest scores first.
        ("threshold=-4,budget=0.25", [[60, 5], [5, 10], [5, 5]]),
        ("threshold=-4,budget=15", [[60, 5], [5, 10], [5, 5]]),
        ("threshold=-4,budget=0.5", [[60, 5], [5, 60], [5, 5]]),
    ],
)
def test_worked_example_rows_keep_what_is_above(
    model: Any, tmp_path: Path, options: str, expected: list[list[int]]
) -> None:
    ridge_LXH = torch.zeros(3, 69, 2)
    ridge_LXH[:, -1] = torch.tensor(LEVELS)  # the last feature is 1
    file = write(model, tmp_path / "levels.safetensors", ridge_LXH)
    with kvpress.attach(model, f"zap:{options},calibration={file}") as engine:
        cache = read(engine, helpers.prompt(1, TOKENS), [TOKENS])
    report = cache.report()
    assert [layer[0] for layer in report.slots_kept] == expected
    mean = sum(map(sum, expected)) / 6
    low, high = min(map(min, expected)), max(map(max, expected))
    assert f"6 rows keep {low} to {high} slots, {mean:.0f} on average." in report.notes
    assert any("only tokens with scores above" in note for note in report.notes)
    assert not any("nothing was evicted" in note for note in report.notes)
    held = sum(sum(layer[0]) for layer in report.slots_kept)
    assert sum(len(row) for rows in helpers.positions(cache) for row in rows) == held


@pytest.mark.parametrize("threshold", [-1.0, 0.0])
def test_exactly_what_is_above_stays(model: Any, file: Path, threshold: float) -> None:
    ids = helpers.prompt(1, TOKENS)
    with kvpress.attach(model, f"zap:threshold={threshold},calibration={file}") as engine:
        kept = helpers.positions(read(engine, ids, [TOKENS]))
    for found, wanted_HT in zip(kept, predicted(model, file, ids), strict=True):
        for row, own_T in zip(found, wanted_HT, strict=True):
            assert set(row) == GUARDED | set((own_T > threshold).nonzero().flatten().tolist())
    assert len({len(row) for rows in kept for row in rows}) > 3


def test_later_turns_are_thinned_like_the_first(model: Any, file: Path, tmp_path: Path) -> None:
    """Forks and files too; decoded tokens stay until the next prompt."""
    ids, spec = helpers.prompt(2, 100), f"zap:threshold=-0.5,calibration={file}"
    with kvpress.attach(model, spec) as engine:
        cache = read(engine, ids, [50, *[1] * 10])
        before = [state.rows.counts_BH.clone() for state in cache.states]
        cache.save(tmp_path / "cache.safetensors")
        others = [cache.fork(), engine.load_cache(tmp_path / "cache.safetensors")]
        with torch.no_grad():
            for one in (cache, *others):
                model(ids[:, 60:], past_key_values=one)
                assert one.check_integrity()
    own = predicted(model, file, ids[:1])[0]  # of the first layer: nothing that went changes it
    for row, own_T in zip(helpers.positions(cache)[0], own, strict=True):
        first = {0, 1, 2, 3, 99}
        assert set(row) == first | set((own_T > -0.5).nonzero().flatten().tolist())
    for b in range(2):
        assert all(helpers.positions(x, b) == helpers.positions(cache, b) for x in others)
    # Ten decoded tokens, and what the first 50 left.
    assert all(bool((x >= 15).all()) for x in before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", ["", "budget=0.3,"])
def test_a_padded_row_is_the_row_alone(model: Any, file: Path, budget: str, side: str) -> None:
    lengths = [41, 9, 23, 41]
    ids, mask = helpers.padded(lengths, side)
    with kvpress.attach(model, f"zap:{budget}threshold=-0.3,calibration={file}") as engine:
        cache = engine.new_cache()
        together = helpers.greedy(model, ids, mask, 5, cache)
        for b in range(len(lengths)):
            own, alone = ids[b : b + 1][mask[b : b + 1].bool()][None], engine.new_cache()
            tokens = helpers.greedy(model, own, torch.ones_like(own), 5, alone)
            assert torch.equal(tokens[0], together[b])
            assert helpers.positions(alone) == helpers.positions(cache, b)


def test_bytes_are_those_of_the_slots_held(model: Any, file: Path) -> None:
    ids, pages = helpers.prompt(1, 200), 8
    with kvpress.attach(model, f"zap:threshold=-0.3,calibration={file}", page_size=pages) as engine:
        cache = read(engine, ids, [200])
    counts = torch.stack([state.rows.counts_BH for state in cache.states])
    slots = int((-(-counts // pages) * pages).sum())
    pools = sum(p.nbytes for s in cache.states for p in s.store.paging.pool.tensors())
    assert pools == slots * (2 * 16 * 4 + 4 + 4)  # key and value, position, score
    assert pools <= cache.report().bytes_held < pools + 6 * 200


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zap:threshold=-4+heads", "two ways.*threshold"),
        ("zap:threshold=-4+adakv", "both replace the stage 'compete'"),
        ("zap:threshold=-4,budget=64KiB", "whole pages"),
        ("zap:threshold=-99", "out of range"),
    ],
)
def test_what_a_threshold_cannot_stand_beside_is_refused(spec: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        kvpress.attach(helpers.tiny(), spec)


def test_what_is_not_given_is_the_other_one() -> None:
    assert load_policy("zap").budget == load_policy("zap", budget=0.5).budget
    assert load_policy("zap").compete() is None
    alone, beside = load_policy("zap", threshold=-4), load_policy("zap", threshold=-4, budget=0.25)
    assert str(alone.budget) == "1.0" and load_policy("zap", budget="none", threshold=-4) == alone
    assert alone.compete() == Pool("layer", above=math.exp(-4))
    assert beside.compete() == Pool("model", above=math.exp(-4))
