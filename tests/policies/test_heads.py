"""Budgets per head and scores predicted from keys and values, both from a calibration."""

from __future__ import annotations

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
from kvpress.policy import Calibrated, Room
from kvpress.policy.loading import load_policy

# The worked example of the specification: shares of a quarter, three layers of two heads.
SHARES = torch.tensor([[0.9, 0.1], [0.2, 0.05], [0.6, 0.15]])
SHARES = SHARES * 0.25 / SHARES.mean()


@pytest.fixture
def model() -> Any:
    return helpers.sharp("llama")


@pytest.fixture
def file(model: Any, tmp_path: Path) -> Path:
    path = tmp_path / "heads.safetensors"
    curve_LHX = torch.stack([(SHARES * f / 0.25).clamp_max(1) for f in FRACTIONS], dim=-1)
    ridge_LXH = torch.randn(3, 69, 2, generator=torch.Generator().manual_seed(0)) / 8
    tensors = {"share_LHX": curve_LHX, "ridge_LXH": ridge_LXH}
    learned.write(path, model, "heads", learned.Learned(tensors, {}, 1, True))
    return path


@torch.no_grad()
def read(model: Any, spec: str, ids: torch.Tensor) -> Any:
    with kvpress.attach(model, spec) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
    assert cache.check_integrity()
    return cache


def test_the_worked_example_of_the_specification(model: Any, file: Path) -> None:
    # c = 0.72432: the parts [.6519, .08], [.1449, .08], [.4346, .1086] of 100 tokens.
    spec = f"streaming_llm:budget=0.25,sink=8+heads:calibration={file}"
    kept = [layer[0] for layer in read(model, spec, helpers.prompt(1, 100)).report().slots_kept]
    assert kept == [[65, 8], [15, 8], [43, 11]]


@pytest.mark.parametrize("budget", ["0.05", "0.25", "0.5", "0.9", "1.0", "20", "300"])
def test_sums_are_those_of_equal_rows_whatever_the_budget(
    model: Any, file: Path, budget: str
) -> None:
    ids, scorer = helpers.prompt(2, 120), f"random:budget={budget},recent=2"
    plain = read(model, scorer, ids).report().slots_kept
    kept = read(model, f"{scorer}+heads:calibration={file}", ids).report().slots_kept
    for b in range(2):
        assert sum(sum(x[b]) for x in kept) == sum(sum(x[b]) for x in plain)
    assert (kept == plain) == (budget in ("1.0", "300"))


def test_every_row_keeps_a_part_and_equal_shares_are_equal_rows() -> None:
    policy = load_policy("heads", least=0.1)
    curve = torch.zeros(2, 2, len(FRACTIONS))
    curve[0] = torch.tensor(FRACTIONS) * 2
    room = Room(30, 120, 4, (2, 2), {"share_LHX": curve})
    given = policy.allocate(room)
    assert float(given.sum()) == pytest.approx(120) and float(given.min()) > 2
    room = Room(30, 120, 4, (2, 2), {"share_LHX": torch.tensor(FRACTIONS).expand(2, 2, -1)})
    torch.testing.assert_close(policy.allocate(room), torch.full((2, 2), 30.0).double())


@torch.no_grad()
def test_scores_are_predicted_once_and_kept(model: Any, file: Path) -> None:
    ids = helpers.prompt(1, 90)
    with kvpress.attach(model, "full") as engine:
        whole = engine.new_cache()
        model(ids, past_key_values=whole)
        columns = [state.rows.dense_by_position([0]) for state in whole.states]
    turns, ridge_LXH = rotations(model), learned.read(file, model, "heads").tensors["ridge_LXH"]
    with kvpress.attach(model, f"zap:budget=0.5,recent=0,sink=0,calibration={file}") as engine:
        cache = engine.new_cache()
        model(ids[:, :50], past_key_values=cache)
        for step in range(50, 60):  # decoded tokens are scored with the prompt behind them
            model(ids[:, step : step + 1], past_key_values=cache)
        model(ids[:, 60:], past_key_values=cache)
    found = cache.states[0].rows.dense_by_position([0])
    own = columns[0]  # of the first layer, where nothing that was evicted can have changed them
    x = features(own["key"], own["value"], own["position"].long(), turns[0])
    predicted_HT = (x @ ridge_LXH[0]).exp()[0].mT
    at_HS = found["position"][0].long()
    torch.testing.assert_close(
        found["mass"][0], predicted_HT.gather(1, at_HS), rtol=1e-4, atol=1e-6
    )
    kept = {int(p) for p in at_HS[0]}
    best = predicted_HT[0].topk(5).indices.tolist()
    assert set(best) <= kept  # whatever came when


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "spec", ["zap:budget=0.4,{}", "zap:budget=0.4,{}+heads:{}", "h2o+heads:{}"]
)
def test_a_padded_row_is_the_row_alone(model: Any, file: Path, spec: str, side: str) -> None:
    spec = spec.format(*[f"calibration={file}"] * 2)
    lengths, new = [41, 9, 23, 41], 6
    ids, mask = helpers.padded(lengths, side)
    with kvpress.attach(model, spec) as engine:
        cache = engine.new_cache()
        together = helpers.greedy(model, ids, mask, new, cache)
        for b in range(len(lengths)):
            own, alone = ids[b : b + 1][mask[b : b + 1].bool()][None], engine.new_cache()
            tokens = helpers.greedy(model, own, torch.ones_like(own), new, alone)
            assert torch.equal(tokens[0], together[b])
            assert helpers.positions(alone) == helpers.positions(cache, b)


@pytest.mark.parametrize("spec", ["zap", "snapkv:window=8+heads"])
def test_nothing_is_guessed(model: Any, spec: str, file: Path) -> None:
    with pytest.raises(PolicyError, match=r"kvpress calibrate heads --model .* --out FILE"):
        kvpress.attach(model, spec)
    part = f"{spec}:calibration={file}"
    other = helpers.sharp("llama", vocab_size=98)
    with pytest.raises(PolicyError, match="was made for"):
        kvpress.attach(other, part)
    found = learned.read(file, model, "heads")
    learned.write(file, model, "heads", found._replace(finished=False))
    with pytest.raises(PolicyError, match="unfinished"):
        kvpress.attach(model, part)
    learned.write(file, model, "heads", found._replace(tensors={"other": torch.zeros(3)}))
    with pytest.raises(PolicyError, match="has no"):
        kvpress.attach(model, part)
    learned.write(file, model, "sale", found)
    with pytest.raises(PolicyError, match="kind='sale'"):
        kvpress.attach(model, part)


@pytest.mark.parametrize("spec", ["h2o:budget=0.4+heads:{}", "zap:budget=0.4,{}"])
@torch.no_grad()
def test_a_loaded_cache_knows_the_calibration(
    model: Any, file: Path, spec: str, tmp_path: Path
) -> None:
    ids = helpers.prompt(1, 100)
    with kvpress.attach(model, spec.format(f"calibration={file}")) as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        loaded = engine.load_cache(tmp_path / "cache.safetensors")
        for x in (cache, loaded):
            for step in range(20):
                model(ids[:, step : step + 1], past_key_values=x)
            model(ids[:, :30], past_key_values=x)
        assert helpers.positions(loaded) == helpers.positions(cache)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_bytes_are_never_exceeded(model: Any, file: Path, page_size: int) -> None:
    spec = f"snapkv:budget=120000B,window=6+heads:calibration={file}"
    with kvpress.attach(model, spec, page_size=page_size) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(helpers.prompt(1, 250), past_key_values=cache)
        held = cache.report().bytes_held
    assert 100_000 < held <= 120_000


def test_what_is_needed_is_declared() -> None:
    assert load_policy("heads").calibrated == Calibrated("heads", ("share_LHX",), None)
    assert load_policy("zap").calibrated == Calibrated("heads", ("ridge_LXH",), None)
    assert load_policy("zap").needs == {"rotation"}
