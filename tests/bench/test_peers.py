"""`kvpress bench peers`: bytes counted alike, and a peer in a process of its own.

The peer's package is replaced by one of two presses: the exchange is tested, not the package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import helpers
import pytest
import torch
from kvpress.bench.commands import bench
from kvpress.bench.common import models
from kvpress.bench.common.journal import read
from kvpress.bench.common.storages import storage_bytes
from kvpress.bench.peers import commands
from kvpress.bench.peers.remote import Peer, PeerError, environment
from kvpress.bench.quality.sample import Question
from kvpress.bench.quality.system import LocalSystem
from kvpress.bench.speed.setting import Setting
from typer.testing import CliRunner

import kvpress

PACKAGE = """
import contextlib
from dataclasses import dataclass

import torch

@dataclass
class KeepPress:
    compression_ratio: float = 0.0

    @contextlib.contextmanager
    def __call__(self, model):
        hooks = [
            layer.self_attn.register_forward_hook(self.prune, with_kwargs=True)
            for layer in model.model.layers
        ]
        yield
        for hook in hooks:
            hook.remove()

    def prune(self, module, args, kwargs, output):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        layer = cache.layers[module.layer_idx]
        kept = round(layer.keys.shape[2] * (1 - self.compression_ratio))
        layer.keys, layer.values = (x[:, :, :kept].clone() for x in (layer.keys, layer.values))

@dataclass
class MaskPress(KeepPress):
    def prune(self, module, args, kwargs, output):
        module.masked_key_indices = tuple(torch.tensor(x) for x in ((0, 0), (0, 1), (3, 5)))

@dataclass
class OuterPress(KeepPress):
    press: object = None

    def __init__(self, press):
        self.press, self.compression_ratio = press, press.compression_ratio
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose Python finds the package above under the peer's name."""
    package = tmp_path / "packages" / "kvpress.py"
    package.parent.mkdir()
    package.write_text(PACKAGE)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("KVPRESS_PEERS", str(tmp_path))


# ---- bytes


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", ["full", "h2o:budget=0.5", "keyformer:budget=40", "knorm"])
def test_storages_agree_with_the_ledger(family: str, policy: str) -> None:
    model = helpers.tiny(family)
    with kvpress.attach(model, policy) as engine, torch.inference_mode():
        cache = engine.new_cache()
        for tokens in (100, 1, 1):
            model(helpers.prompt(2, tokens), past_key_values=cache)
        report = engine.report()
    extra = storage_bytes(cache) - report.bytes_held - report.bytes_ids
    assert 0 <= extra < 1024  # a few numbers per sequence


def test_a_storage_counts_whole_and_once_wherever_it_is() -> None:
    class Slotted:
        __slots__ = ("tensor",)

    class Wrapped(torch.Tensor):
        inner: torch.Tensor

    whole = torch.zeros(1000)
    slotted, wrapped = Slotted(), torch.zeros(0).as_subclass(Wrapped)
    slotted.tensor, wrapped.inner = torch.zeros(10), torch.zeros(5)
    model = torch.nn.Linear(50, 50)
    things = {"a": [whole[:1], whole[5:9]], "b": (slotted, model), "c": wrapped}
    things["self"] = things
    assert storage_bytes(things) == 4000 + 40 + 20


@pytest.mark.parametrize("name", ["transformers", "transformers-fp8"])
def test_transformers_caches_answer_and_are_counted(name: str) -> None:
    model = helpers.tiny("llama")
    system, question = LocalSystem(model, name), Question((1, 2), (3, 4, 5))
    cache = system.read(list(range(3, 67)))
    held = system.bytes(cache).held
    values = 3 * 2 * 2 * 16 * 64
    expected = {"transformers": 4 * values, "transformers-fp8": values + 3 * 2 * 4}
    assert held == expected[name]
    first = system.ask(cache, question)
    assert torch.equal(first, system.ask(cache, question))  # the cache stayed as it was
    full = LocalSystem(model, "transformers")
    exact = full.ask(full.read(list(range(3, 67))), question)
    assert (first - exact).abs().max() < (1e-6 if name == "transformers" else 0.2)


# ---- a peer


@pytest.mark.usefixtures("installed")
def test_a_peer_gives_the_logits_and_bytes_of_its_own_model(tiny_model: Path) -> None:
    setting = Setting(model=str(tiny_model))
    model, _ = models.load(str(tiny_model), device="cpu")
    here, question = LocalSystem(model, "transformers"), Question((1, 2, 3), (4, 5, 6))
    peer = Peer("nvidia/KeepPress", setting)
    try:
        caches = here.read(range(5, 105)), peer.read(range(5, 105))
        assert here.bytes(caches[0])[0] == peer.bytes(caches[1])[0]
        for stepwise in (False, True):
            answers = (
                here.ask(caches[0], question, stepwise),
                peer.ask(caches[1], question, stepwise),
            )
            assert (answers[0] - answers[1]).abs().max() < 1e-5
        peer.use("nvidia/KeepPress:budget=0.5")
        assert peer.kept(range(5, 105)) == 3 * [2 * [list(range(50))]]
        peer.use("nvidia/MaskPress")
        unmasked = [[i for i in range(100) if i != masked] for masked in (3, 5)]
        assert peer.kept(range(5, 105)) == 3 * [unmasked]
    finally:
        peer.close()


@pytest.mark.usefixtures("installed")
def test_a_peer_that_cannot_do_it_says_why(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(model=str(tiny_model))
    with pytest.raises(PeerError, match="no press 'NoPress'"):
        Peer("nvidia/NoPress", setting)
    with pytest.raises(PeerError, match="/no/such/model"):
        Peer("nvidia/KeepPress", Setting(model="/no/such/model"))
    monkeypatch.setenv("KVPRESS_PEERS", "/no/such/folder")
    with pytest.raises(PeerError, match="scripts/peers"):
        environment()


@pytest.mark.usefixtures("installed")
def test_the_command_compares_everybody(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # int4 needs a package that is not installed for the tests.
    monkeypatch.setattr(commands, "CACHES", ("transformers", "transformers-fp8"))
    out = tmp_path / "peers.jsonl"
    options = ["peers", "--model", str(tiny_model), "--tokens", "300", "--rounds", "2"]
    options += ["--samples", "1", "--device", "cpu", "--threads", "1", "--out", str(out)]
    options += ["--policy", "full", "--policy", "knorm", "--press", "OuterPress(KeepPress)"]
    done = CliRunner().invoke(bench, options)
    assert done.exit_code == 0, done.output
    rows = {(row["bench"], row["candidate"]): row for row in read(out)}
    theirs = "nvidia/OuterPress(KeepPress):budget=0.5"
    for name in ("transformers", "transformers-fp8", "full", "knorm:budget=0.5", theirs):
        for which in ("decode", "prefill"):
            row = rows[which, name]
            assert row["error"] is None and row["seconds"]["count"] == 2
            assert [asked["task"] for asked in row["quality"]] == ["copy", "needle"]
    prefill = {name: row["bytes_held"] for (which, name), row in rows.items() if which == "prefill"}
    assert prefill[theirs] == prefill["transformers"] / 2
    assert rows["decode", theirs]["bytes_held"] == prefill[theirs] + 3 * 3 * 2 * 2 * 16 * 4
    assert "Peers: 300 tokens" in done.output and "50" in done.output
    again = CliRunner().invoke(bench, options)
    assert again.stdout == done.stdout and "Nothing was measured" in again.stderr
