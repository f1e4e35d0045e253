"""TriAttention: the worked example, and that one product is the mean over many positions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.errors import PolicyError
from kvpress.formulas.rotation import Rotation
from kvpress.hf import learned
from kvpress.hf.rotation_probe import rotations
from kvpress.policy.loading import load_policy

PAIR = Rotation(torch.tensor([0.5]))


def turned(length: float, angle: float) -> torch.Tensor:
    return torch.tensor([length * math.cos(angle), length * math.sin(angle)])


def test_the_worked_example() -> None:
    mean = turned(2.0, 0.3)
    key = turned(1.5, 1.0)
    keys = torch.stack([PAIR.turn(key, torch.tensor(p)) for p in (2, 6)])
    known = {"query_LND": mean[None], "length_LNF": torch.tensor([[2.5]])}
    shown = helpers.shown(keys, None, [2, 6], rotation=PAIR, calibrated=known)
    object.__setattr__(shown, "seen_B", torch.tensor([11]))  # the last token is at position 10
    plain = load_policy("triattention", future=4)
    # Two tokens standardised are 1 and -1 whatever they were: what they were is seen without it.
    found = plain.raw(shown)[0, 0, 0]
    assert found.tolist() == pytest.approx([0.1126, -1.1310], abs=1e-4)
    assert plain.score(shown).flatten().tolist() == pytest.approx([1.0, -1.0], abs=1e-5)


def test_one_product_is_the_mean_over_all_positions() -> None:
    draw = torch.Generator().manual_seed(0)
    rotation = Rotation(torch.rand(3, generator=draw), interleaved=True, start=1)
    keys, mean = torch.randn(2, 2, 9, 8, generator=draw), torch.randn(4, 8, generator=draw)
    known = {"query_LND": mean, "length_LNF": torch.rand(4, 3, generator=draw) + 2}
    shown = helpers.shown(keys, rotation=rotation, calibrated=known)
    found = load_policy("triattention", future=40).raw(shown)
    ahead = [rotation.turn(mean, torch.tensor(8 + 2**n)) for n in range(6)]
    query = torch.stack(ahead).mean(0).view(2, 2, 8)
    rest = (known["length_LNF"] - rotation.lengths(mean)).view(2, 2, 3)
    expected = query @ keys.mT + rest @ rotation.lengths(keys).mT
    torch.testing.assert_close(found, expected)


def test_lengths_of_pairs_are_those_before_any_turn() -> None:
    draw = torch.Generator().manual_seed(0)
    for rotation in (Rotation(torch.rand(3)), Rotation(torch.rand(3), True, 2)):
        keys = torch.randn(5, 8, generator=draw)
        lengths = rotation.lengths(keys)
        assert lengths.shape == (5, 3)
        torch.testing.assert_close(rotation.lengths(rotation.turn(keys, torch.arange(5))), lengths)
        part = keys[:, rotation.start : rotation.start + 6]
        torch.testing.assert_close(lengths.square().sum(-1), part.square().sum(-1))


@pytest.fixture
def calibrated(tmp_path: Path) -> tuple[Any, str]:
    from kvpress.bench.calibrate.heads import queries

    model = helpers.tiny()
    texts = [helpers.prompt(1, 50, seed=s) for s in range(2)]
    mean, length = queries(model, None, texts)
    tensors = {"query_LND": mean, "length_LNF": length}
    file = tmp_path / "heads.safetensors"
    learned.write(file, model, "heads", learned.Learned(tensors, {}, 2, True))
    return model, f"triattention:calibration={file}"


@torch.no_grad()
def test_what_is_calibrated_is_the_mean_of_the_models_queries(calibrated: Any) -> None:
    model, spec = calibrated
    known = learned.read(spec.partition("=")[2], model, "heads").tensors
    seen: list[torch.Tensor] = []
    attention = model.model.layers[1].self_attn
    handle = attention.q_proj.register_forward_hook(lambda _m, _i, out: seen.append(out))
    for s in range(2):
        model(helpers.prompt(1, 50, seed=s))
    handle.remove()
    plain = torch.cat(seen)  # [texts, tokens, N · D], before any turn
    plain = plain.flatten(0, 1).view(100, -1, attention.head_dim)
    torch.testing.assert_close(known["query_LND"][1], plain.mean(0), atol=1e-5, rtol=1e-4)
    rotation = rotations(model)[1]
    assert rotation is not None
    lengths = rotation.lengths(plain).mean(0)
    torch.testing.assert_close(known["length_LNF"][1], lengths, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_is_the_row_alone_and_counts_are_exact(calibrated: Any, side: str) -> None:
    model, spec = calibrated
    recipe = f"{spec},budget=20,interval=4"
    ids, mask = helpers.padded([50, 30], side)
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache()
        together = helpers.greedy(model, ids, mask, 14, cache)
        for state in cache.states:
            assert int(state.rows.counts_BH.max()) <= 23
        for row in range(2):
            alone, own = ids[row : row + 1][:, mask[row].bool()], engine.new_cache()
            expected = helpers.greedy(model, alone, torch.ones_like(alone), 14, own)
            assert torch.equal(together[row : row + 1], expected)
            assert helpers.positions(cache, row) == helpers.positions(own)


def test_a_model_without_a_calibration_is_refused() -> None:
    with pytest.raises(PolicyError, match="calibrate heads"):
        kvpress.attach(helpers.tiny(), "triattention")
