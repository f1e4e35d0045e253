"""SALE in the engine: batches, chunks, other policies, calibrations, and the real model."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from kvpress.bench.calibrate import breakeven, commands, search
from rich.console import Console

import kvpress
from kvpress.errors import PolicyError
from kvpress.formulas.block_map import Blocks
from kvpress.hf import calibration
from kvpress.hf.calibration import Calibration
from kvpress.pipe.state.ledger import density as density_of
from kvpress.policy import Policy, Room, option
from kvpress.policy.budget import Budget

LONG = 700
SPARSE = "sale:threshold=2.0,least=1"


def read(model: Any, policy: Any, ids: torch.Tensor, chunks: int = 1) -> tuple[torch.Tensor, Any]:
    """The logits of a prompt, read in equal chunks, and the cache."""
    with kvpress.attach(model, policy) as engine, torch.no_grad():
        cache = engine.new_cache()
        return torch.cat([model(x, cache=cache).logits for x in ids.chunk(chunks, 1)], 1), cache


def density(cache: Any) -> float:
    return float(cache.report().density)


def test_threshold_0_is_dense_and_decoding_is_untouched() -> None:  # S1, S13
    model, ids = helpers.tiny(), helpers.prompt(2, LONG)
    mask = torch.ones_like(ids)
    tokens = []
    for policy in ("full", "sale:threshold=0,least=1"):
        with kvpress.attach(model, policy) as engine:
            cache = engine.new_cache()
            tokens.append(helpers.greedy(model, ids, mask, 8, cache))
    assert torch.equal(*tokens)
    assert density(cache) == 1.0 and density_of(cache.states[0]) == [1.0] * 6


def test_blocks_are_left_out_and_counted() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, LONG)
    exact, _ = read(model, "full", ids)
    logits, cache = read(model, SPARSE, ids)
    assert 0.2 < density(cache) < 0.9
    assert not torch.equal(logits, exact)
    report = cache.report()
    assert [len(layer.density) for layer in report.layers] == [6] * len(report.layers)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(report)
    assert "Blocks of prompt attention computed" in console.export_text()
    assert report.to_dict()["layers"][0]["density"] == report.layers[0].density


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_padded_batch_equals_the_row_alone(side: str) -> None:
    model, lengths = helpers.tiny(), [LONG, 30, 400]
    ids, mask = helpers.padded(lengths, side)
    with kvpress.attach(model, SPARSE) as engine:
        cache = engine.new_cache()
        together = helpers.greedy(model, ids, mask, 4, cache)
        for row in range(len(lengths)):
            own = ids[row : row + 1][:, mask[row].bool()]
            alone = helpers.greedy(model, own, torch.ones_like(own), 4, engine.new_cache())
            assert torch.equal(together[row : row + 1], alone)


def test_chunks_attend_to_longer_keys() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, LONG)
    exact, _ = read(model, "full", ids)
    dense, cache = read(model, "sale:threshold=0,least=1", ids, chunks=2)
    torch.testing.assert_close(dense, exact, rtol=1e-4, atol=1e-4)
    _, cache = read(model, SPARSE, ids, chunks=2)
    wanted = Blocks(350, 350).causal + Blocks(350, 700).causal
    computed_N, blocks = cache.states[0].blocks
    assert blocks == wanted and len(computed_N) == 6
    assert int(computed_N.sum()) / (6 * wanted) == pytest.approx(
        sum(density_of(cache.states[0])) / 6
    )


@pytest.mark.parametrize(
    "other", ["keyformer:budget=0.5", "snapkv:budget=0.5", "think", "quant", "d2o:budget=0.5"]
)
def test_it_combines(other: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, LONG)
    _, cache = read(model, f"{SPARSE}+{other}", ids)
    _, alone = read(model, other, ids)
    assert cache.report().bytes_held == alone.report().bytes_held
    assert density(cache) < 0.9 and cache.check_integrity()
    with kvpress.attach(model, f"{SPARSE}+{other}") as engine:
        helpers.greedy(model, ids, torch.ones_like(ids), 8, engine.new_cache())


def test_sums_are_of_the_blocks_computed() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, LONG)
    for chunks in (1, 2):
        _, cache = read(model, f"{SPARSE}+h2o:budget=1.0", ids, chunks)
        for state in cache.states:
            mass = state.store.dense_by_position([0])["mass"]
            assert float(mass.sum()) == pytest.approx(6 * LONG, rel=1e-4)
        assert "of the blocks computed" in " ".join(cache.report().notes)
        _, exact = read(model, "h2o:budget=1.0", ids, chunks)
        one, other = (x.states[0].store.dense_by_position([0])["mass"] for x in (cache, exact))
        assert not torch.allclose(one, other) and (one - other).abs().sum() < 0.8 * other.sum()


@pytest.mark.parametrize("family", ["gemma2", "mistral-sliding", "bloom"])
def test_layers_that_cannot_be_sparse_are_dense_and_said(family: str) -> None:
    model, ids = helpers.tiny(family), helpers.prompt(1, 300)
    exact, _ = read(model, "full", ids)
    logits, cache = read(model, SPARSE, ids)
    torch.testing.assert_close(logits, exact)
    assert "computed in full for" in " ".join(cache.report().notes)


def test_what_stays_dense_is_said() -> None:
    ids = helpers.prompt(1, 100)
    _, cache = read(helpers.tiny(), "sale:threshold=2", ids)
    assert "fewer than 2,048 new tokens" in " ".join(cache.report().notes)
    assert cache.report().density == 1.0


def test_a_pass_that_records_gradients_is_dense_and_says_so() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, LONG)
    with kvpress.attach(model, SPARSE) as engine:
        cache = engine.new_cache()
        model(ids, cache=cache).logits.sum().backward()
    assert density(cache) == 1.0
    assert "passes that record gradients" in " ".join(cache.report().notes)


@dataclass(frozen=True, kw_only=True)
class Uneven(Policy):
    """KV heads that keep different numbers of slots."""

    budget: Budget = option(0.5, "kept")

    @property
    def rank(self) -> str:
        return "position"

    def allocate(self, room: Room) -> list[list[float]]:
        return [[0.5 * room.slots, 1.5 * room.slots]] * len(room.heads)


def test_rows_of_different_lengths_are_dense_and_said() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, LONG)
    _, alone = read(model, Uneven(), ids, chunks=2)
    logits, cache = read(model, [SPARSE, Uneven()], ids, chunks=2)
    assert "rows of different lengths" in " ".join(cache.report().notes)
    assert cache.states[0].blocks[1] == Blocks(350, 350).causal  # the first chunk alone
    assert logits.isfinite().all() and cache.check_integrity()
    assert cache.report().slots_kept == alone.report().slots_kept


def test_a_threshold_and_a_calibration_exclude_each_other() -> None:
    with pytest.raises(PolicyError, match="exclude each other"):
        kvpress.attach(helpers.tiny(), "sale:threshold=0.1,calibration=x.safetensors")


def test_without_a_calibration_a_default_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), kvpress.attach(helpers.tiny(), "sale"):
        assert "No calibration ships for this model" in caplog.text


class Search:
    """A search on a small model."""

    def __init__(self, error: float = 0.3, relative: bool = True) -> None:
        self.model = helpers.tiny()
        self.bound = search.Bound(error, relative)
        self.texts = list(helpers.prompt(2, LONG)[:, None])
        layers, heads = len(self.model.model.layers), 6
        self.begun = Calibration(torch.full((layers, heads), 0.008), 0, None, {}, [])

    def run(self, begun: Calibration | None = None, on_layer: Any = lambda _: None) -> Calibration:
        return search.search(self.model, self.texts, begun or self.begun, self.bound, on_layer)


def test_thresholds_are_halves_and_the_bound_holds() -> None:  # S11
    made = Search(error=1e-3)
    found = made.run()
    halves = [0.008 / 2**i for i in range(7)]
    for tau in found.tau_LN.flatten().tolist():
        assert tau == 0 or any(tau == pytest.approx(half) for half in halves)
    layer = 0

    def see(given: search.Given, exact: torch.Tensor) -> None:
        nonlocal layer
        sparse = given.sparse(found.tau_LN[layer % len(found.tau_LN)], found.local)
        assert bool((made.bound.of(exact, sparse) < 1).all())
        layer += 1

    with kvpress.attach(made.model, "full") as engine, torch.no_grad(), search.watching(see):
        for text in made.texts:
            made.model(text, cache=engine.new_cache())
    assert layer == 2 * len(found.tau_LN)
    looser = Search(error=1e-1).run()
    assert bool((looser.tau_LN >= found.tau_LN).all())


@pytest.mark.parametrize("relative", [True, False])
def test_the_error_is_that_of_the_paper(relative: bool) -> None:
    exact = torch.randn(1, 2, 10, 3)
    error = search.Bound(0.5, relative).of(exact, exact + 0.1)
    wanted = torch.full((2,), 0.3)  # the sum over channels, per token
    if relative:
        wanted = wanted / (exact.abs().sum((0, 2, 3)) / 10)
    torch.testing.assert_close(error, wanted / 0.5)


def test_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    made, path = Search(error=1e-3), tmp_path / "sale.safetensors"
    whole = made.run()

    def stop(known: Calibration) -> None:
        calibration.write(path, made.model, known)
        if len(known.done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.run(on_layer=stop)
    known = commands.begin(path, made.model, {}, 0, 0.008)
    assert len(known.done) == 3
    assert torch.equal(made.run(known).tau_LN, whole.tau_LN)
    with pytest.raises(PolicyError, match="holds a search with"):
        commands.begin(path, made.model, {"error": 1}, 0, 0.008)


def test_a_calibration_is_of_one_model(tmp_path: Path) -> None:
    model, path = helpers.tiny(), tmp_path / "sale.safetensors"
    tau_LN = torch.full((len(model.model.layers), 6), 2.0)
    calibration.write(path, model, Calibration(tau_LN, 128, 300, {}, []))
    _, cache = read(model, f"sale:calibration={path}", helpers.prompt(1, LONG))
    assert 0.2 < density(cache) < 0.9
    half = helpers.tiny().to(torch.bfloat16)
    kvpress.attach(half, f"sale:calibration={path}").detach()  # another dtype is no other model
    with pytest.raises(PolicyError, match="local=64"):
        kvpress.attach(model, f"sale:calibration={path},local=64")
    with torch.no_grad():
        half.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(PolicyError, match="was made for"):
        kvpress.attach(half, f"sale:calibration={path}")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(PolicyError, match=r"cut off or altered.*kvpress calibrate") as raised:
        kvpress.attach(model, f"sale:calibration={path}")
    assert "cache" not in str(raised.value)
    with pytest.raises(PolicyError, match=r"cannot be read.*kvpress calibrate"):
        kvpress.attach(model, "sale:calibration=nowhere.safetensors")


@pytest.mark.parametrize(
    "odd",
    [
        {"tau_LN": torch.full((3, 6), torch.nan)},
        {"tau_LN": torch.ones(3, 6, dtype=torch.int64)},
        {"tau_LN": torch.ones(18)},
        {"local": -1},
        {"local": None},
        {"least": "soon"},
        {"done": None},
    ],
    ids=str,
)
def test_a_calibration_that_cannot_be_is_refused_whatever_its_checksum(
    odd: dict[str, Any], tmp_path: Path
) -> None:
    model, path = helpers.tiny(), tmp_path / "sale.safetensors"
    whole = Calibration(torch.ones(3, 6), 128, 300, {}, [])
    calibration.write(path, model, whole._replace(**odd))
    with pytest.raises(PolicyError, match="cannot be a calibration"):
        kvpress.attach(model, f"sale:calibration={path}")


def test_the_length_from_which_it_pays() -> None:
    assert breakeven._first({512: 0.5, 1024: 1.2, 2048: 0.9, 4096: 1.5}) == 4096
    assert breakeven._first({512: 1.5, 1024: 1.2}) == 512
    assert breakeven._first({512: 0.5, 1024: 0.9}) == 2048
    made = Search()
    least, gains = breakeven.break_even(made.model, made.texts[0], made.begun)
    assert list(gains) == [512] and least in (512, 1024)


def test_the_real_model_has_a_calibration(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    text = (Path(kvpress.__file__).parent / "policy" / "base.py").read_text() * 2
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :2500]
    exact, _ = read(model, "full", ids)
    logits, cache = read(model, "sale", ids)
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="none"
    )
    assert density(cache) < 0.9
    assert divergence.sum(-1).mean() < 0.02
