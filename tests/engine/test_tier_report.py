"""What reports say of tiers: bytes where they are, what moved, what it cost."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch

import kvpress
from kvpress.engine import Engine
from kvpress.hf.cache import EngineCache
from kvpress.report import Report
from kvpress.report.tiers import TierFigures, notes, remark

CAPS = {"device": "512KiB", "host": "300KiB"}


def read(engine: Engine, tokens: int = 700, steps: int = 3) -> EngineCache:
    """A cache that has read a prompt and decoded some tokens."""
    ids = torch.arange(tokens)[None].repeat(2, 1) % (helpers.VOCAB - 1) + 1
    ids[1] = ids[1].flip(0)
    cache = engine.new_cache()
    with torch.inference_mode():
        engine.model(ids, cache=cache)
        for _ in range(steps):
            engine.model(ids[:, :1], cache=cache)
    return cache


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    disk = f"2MiB:{tmp_path_factory.mktemp('disk')}"
    with kvpress.attach(helpers.tiny("llama"), "full", **CAPS, disk=disk) as engine:
        return read(engine).report()


def figures(report: Report) -> TierFigures:
    assert report.tiers is not None
    return report.tiers


def test_the_bytes_of_tiers_add_up(report: Report) -> None:
    tiers = figures(report)
    assert sum(tiers.held.values()) == report.bytes_held
    for layer in report.layers:
        assert sum(layer.bytes_tiers.values()) == layer.bytes_held
    for name, held in tiers.held.items():
        assert held == sum(layer.bytes_tiers[name] for layer in report.layers)
        assert 0 < tiers.pages[name] <= tiers.used[name]
        assert tiers.used[name] + tiers.aside[name] <= tiers.caps[name]
    assert tiers.held["device"] > tiers.pages["device"]  # recent slots, tables, positions
    assert tiers.held["host"] == tiers.pages["host"]


def test_what_moved_is_counted_each_way(report: Report) -> None:
    tiers = figures(report)
    for way in tiers.ways.values():
        assert way.bytes > 0 and way.seconds > 0 and way.count > 0
    written = tiers.ways["host to disk"].bytes
    assert written >= tiers.pages["disk"]
    assert tiers.ways["disk to host"].bytes >= tiers.verified > 0
    assert all(tiers.hits.values()) and tiers.stalls > 0
    assert tiers.failures == tiers.integrity_failures == 0
    assert tiers.prompt > 0 and tiers.reading is not None


def test_every_page_is_a_hit_of_one_tier(report: Report) -> None:
    """A step asks for every page of every layer once; what it reads ahead is of the next one."""
    tiers = figures(report)
    with kvpress.attach(helpers.tiny("llama"), "full", device="4MiB") as engine:
        whole = read(engine).report()
    asked, steps = sum(figures(whole).hits.values()), 3
    assert asked <= sum(tiers.hits.values()) < asked * (steps + 1) / steps
    assert figures(whole).hits["host"] == figures(whole).hits["disk"] == 0
    assert figures(whole).direct is None and figures(whole).reading == 0


def test_it_is_one_line_of_the_table_and_all_of_the_dict(report: Report) -> None:
    (line,) = [line for line in str(report).splitlines() if line.startswith("Tiers: ")]
    assert "of 512 KiB; host" in line and "written" in line and "all verified" in line
    assert line in report._repr_html_()
    plain = json.loads(json.dumps(report.to_dict()))
    assert (
        plain["tiers"]["ways"]["disk to host"]["bytes"]
        == figures(report).ways["disk to host"].bytes
    )
    assert set(plain["layers"][0]["bytes_tiers"]) == {"device", "host", "disk"}


def test_without_tiers_nothing_is_said_of_them() -> None:
    with kvpress.attach(helpers.tiny("llama"), "full") as engine:
        report = read(engine, tokens=40).report()
    assert report.tiers is None and "Tiers" not in str(report)
    assert "tiers" not in report.to_dict() and "bytes_tiers" not in report.to_dict()["layers"][0]


def test_it_says_where_recomputing_would_have_been_faster(report: Report) -> None:
    tiers = figures(report)
    (line,) = notes(replace(tiers, reading=2.0, prompt=0.5))
    assert "Recomputing" in line and "2.00 s" in line and "0.50 s" in line
    for known in ({"reading": 0.5}, {"reading": None}, {"reading": 2.0, "prompt": 0.0}):
        assert not list(notes(replace(tiers, **{"prompt": 1.0, **known})))


def test_failures_are_said(report: Report) -> None:
    line = remark(replace(figures(report), failures=3, integrity_failures=1))
    assert "3 reads or writes failed, 1 for what was read" in line
    assert "failed" not in remark(figures(report))


def test_a_sliding_window_is_on_the_device(tmp_path: Path) -> None:
    model = helpers.tiny("gemma3")
    with kvpress.attach(model, "full", device="1MiB", host="1MiB") as engine:
        report = read(engine, tokens=200).report()
    own = [layer for layer in report.layers if layer.kind != "full"]
    assert own and all(x.bytes_tiers["device"] == x.bytes_held for x in own)


def test_a_cache_that_is_dropped_gives_its_room_to_the_next_one() -> None:
    """Also where Python has not looked for cycles yet."""
    caps = {"device": "512KiB", "host": "600KiB"}  # one and a half times as much as a cache
    with kvpress.attach(helpers.tiny("llama"), "full", **caps) as engine:
        gc.collect()
        gc.disable()
        try:
            for _ in range(4):
                read(engine, tokens=300, steps=1)
        finally:
            gc.enable()
