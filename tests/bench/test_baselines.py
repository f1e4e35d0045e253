"""transformers' caches as rivals: what a table compares with."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
import torch
import typer
from kvpress.bench.common.candidates import RIVALS, STATIC, CandidateError, candidate
from kvpress.bench.common.lines import Other, OtherError
from kvpress.bench.common.models import Source
from kvpress.bench.speed import benches
from kvpress.bench.speed.apart import ROOMY, ApartMeasurement
from kvpress.bench.speed.options import baselines
from kvpress.bench.speed.rows import Cell
from kvpress.bench.speed.setting import Setting


@pytest.mark.parametrize("name", ["decode", "throughput"])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_rival_is_timed_in_every_round(name: str, batch: int, tiny_model: Path) -> None:
    setting = Setting(model=str(tiny_model), rounds=3, warmup=1, new_tokens=4)
    model, _ = setting.source.load()
    ids = helpers.prompt(batch, 70) % model.config.vocab_size
    rows = benches.timed(
        setting, benches.LocalCandidates(), model, ids, Cell(name, 70, batch), RIVALS
    )
    assert [row["error"] for row in rows.values()] == [None] * 3
    assert [row["seconds"]["count"] for row in rows.values()] == [3] * 3
    dynamic, apart, static = (row["bytes_held"] for row in rows.values())
    assert apart == dynamic
    slot = model.config.num_hidden_layers * 2 * 2 * 16 * 4  # as transformers counts a token
    assert static - batch * 74 * slot in range(3 * 64)  # and where each layer is
    assert rows[STATIC]["tokens_per_second"] > 0


@torch.no_grad()
def test_a_repeated_static_cache_gives_what_a_dynamic_one_gives() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 50)
    found = []
    for name in ("transformers", STATIC):
        made = candidate(model, name, room=60)
        cache = made.read(ids, 3)
        found.append([made.forward(ids[:, :1].repeat(3, 1), cache) for _ in range(4)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(CandidateError, match="room"):
        candidate(model, STATIC)


def test_the_allocator_of_the_other_process_is_set_and_its_failures_are_named() -> None:
    code = "import os; input(); print('{\"seen\": ' + os.environ['MALLOC_TRIM_THRESHOLD_'] + '}')"
    other = Other("it", [sys.executable, "-c", code], {**os.environ, **ROOMY})
    assert other.request(do="anything") == {"seen": 1 << 40}
    with pytest.raises(OtherError, match="it: its process ended"):
        other.request(do="more")
    other.close()
    setting = Setting(model="/nowhere", rounds=1)
    with pytest.raises(OtherError, match="nowhere"):
        ApartMeasurement(setting, helpers.prompt(1, 8), Cell("decode", 8, 1), "transformers", "x")


def test_which_rivals_a_table_has() -> None:
    def loading(**given: Any) -> Any:
        return SimpleNamespace(source=Source("demo", device="cpu", **given))

    assert baselines("decode", None, loading(), alone=True) == list(RIVALS)
    assert baselines("throughput", None, loading(), alone=True) == list(RIVALS)
    assert baselines("prefill", None, loading(), alone=True) == ["transformers"]
    assert baselines("decode", None, loading(), alone=False) == ["transformers"]
    assert baselines("decode", [STATIC, STATIC], loading(), alone=True) == [STATIC]
    assert baselines("decode", ["transformers-fp8"], loading(), alone=True) == ["transformers-fp8"]
    with pytest.raises(typer.BadParameter, match="allowed"):
        baselines("decode", ["static"], loading(), alone=True)
