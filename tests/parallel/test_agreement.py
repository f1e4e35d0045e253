"""What processes agree on, and how they end: seeds, stops, texts, files, lost processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import helpers
import pytest
import ranks
import torch

import kvpress
from kvpress.errors import AttachError, CacheFileError, InputError, UnsupportedModelError
from kvpress.parallel import ALONE, Ranks, timeout

IDS = helpers.prompt(2, 41)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ranks.distributed()
    path = tmp_path_factory.mktemp("model")
    helpers.sharp("llama", num_attention_heads=4, num_key_value_heads=2).save_pretrained(path)
    return path


def attached(folder: Path, world: int, **options: Any) -> Any:
    return kvpress.attach(ranks.divided(folder, world), "h2o:budget=0.5", **options)


def stops(rank: int) -> Any:
    """A criterion that stops process 1 early: after five new tokens."""
    return lambda ids, scores, **kwargs: rank == 1 and ids.shape[1] > IDS.shape[1] + 4


def stops_later(rank: int) -> Any:
    """One that stops process 0 after nine."""
    return lambda ids, scores, **kwargs: rank == 0 and ids.shape[1] > IDS.shape[1] + 8


def agree(rank: int, world: int, folder: Path, path: Path) -> dict[str, Any]:
    engine, found = attached(folder, world, timeout=20), {}
    torch.manual_seed(100 + rank)
    found["sampled"] = engine.generate(IDS, max_new_tokens=16, do_sample=True).tolist()
    plain = {"max_new_tokens": 16, "do_sample": False}
    found["lengths"] = [
        engine.generate(IDS, stopping_criteria=[criterion(rank)], **plain).shape[1] - IDS.shape[1]
        for criterion in (stops, stops_later)
    ]
    found["timed"] = engine.generate(IDS, max_time=0.0 if rank else 99.0, **plain).shape[1]
    with pytest.raises(InputError, match="2 processes hold this model") as caught:
        engine.generate(IDS[:, rank:], **plain)
    found["refused"] = str(caught.value)
    cache = engine.new_cache()
    first = engine.generate(IDS, cache=cache, max_new_tokens=4, do_sample=False)
    cache.save(path)
    found["report"] = engine.report(cache).to_dict()["ranks"]
    found["said"] = str(engine.report(cache))
    found["ours"] = cache.report().bytes_held
    text = torch.cat([first, IDS[:, :5]], 1)
    ways = (cache, engine.load_cache(path))
    found["on"] = [engine.generate(text, cache=way, **plain).tolist() for way in ways]
    return found


def test_what_processes_agree_on(folder: Path, tmp_path: Path) -> None:
    """Seeds, criteria and clocks that differ, texts that differ, files and reports."""
    path = tmp_path / "cache.safetensors"
    one, two = ranks.together(2, agree, folder, path)
    assert one["sampled"] == two["sampled"]
    assert one["lengths"] == two["lengths"] == [16, 9]
    assert one["timed"] == two["timed"] == IDS.shape[1] + 16
    assert one["refused"] == two["refused"]
    assert one["report"] == two["report"]
    assert [x["held"] for x in one["report"]] == [one["ours"], two["ours"]]
    assert "one of 2 processes" in one["said"]
    assert one["on"] == two["on"] and one["on"][0] == one["on"][1]
    names = {x.name for x in tmp_path.iterdir()}
    assert names == {"cache.rank0of2.safetensors", "cache.rank1of2.safetensors"}

    model = helpers.sharp("llama", num_attention_heads=4, num_key_value_heads=2)
    with kvpress.attach(model, "h2o:budget=0.5") as engine:
        with pytest.raises(CacheFileError, match="saved by 2 processes"):
            engine.load_cache(path)
        with pytest.raises(CacheFileError, match="process 1 of 2"):
            engine.load_cache(tmp_path / "cache.rank1of2.safetensors")


def test_other_files_keep_their_names(tmp_path: Path) -> None:
    model, path = helpers.sharp("llama"), tmp_path / "cache.safetensors"
    with kvpress.attach(model, "h2o:budget=0.5") as engine:
        engine.generate(IDS, max_new_tokens=2)
        engine.cache.save(path)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def is_lost(rank: int, world: int, folder: Path) -> float:
    engine = attached(folder, world, timeout=20)

    def kill(ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        if rank == 1 and ids.shape[1] > IDS.shape[1] + 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    start = time.monotonic()
    with pytest.raises(RuntimeError):
        engine.generate(IDS, max_new_tokens=64, do_sample=False, stopping_criteria=[kill])
    return time.monotonic() - start


def test_a_lost_process_ends_the_others(folder: Path) -> None:
    first, lost = ranks.run(2, is_lost, folder)
    assert lost.code == -signal.SIGKILL
    assert not first.error and first.found < 15


def is_silent(rank: int, world: int, folder: Path) -> float:
    model = ranks.divided(folder, world)
    with kvpress.attach(model, "h2o:budget=0.5", timeout=3), torch.no_grad():
        if rank == 1:
            time.sleep(8)
            return 0.0
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            model(IDS)
        return time.monotonic() - start


def test_a_silent_process_is_given_up(folder: Path) -> None:
    """transformers would wait for two hours: also where the model itself waits."""
    first, _ = ranks.together(2, is_silent, folder)
    assert 2 < first < 7


def refused(rank: int, world: int, folder: Path) -> tuple[str, list[ranks.Outcome]]:
    model = ranks.divided(folder, world)
    with pytest.raises(UnsupportedModelError) as caught:
        kvpress.attach(model, "h2o:budget=0.5")
    said = str(caught.value)
    rules = said.partition("tp_plan={")[2].partition("}")[0]
    plan = dict(part.strip().replace("'", "").split(": ") for part in rules.split(","))
    with pytest.raises(AttachError, match="memory="):
        kvpress.attach(ranks.divided(folder, world, plan), memory="8GiB")
    found = ranks.outcome(ranks.divided(folder, world, plan), "adakv+h2o:budget=0.5", IDS, 8)
    return said, [found]


@pytest.mark.parametrize(("queries", "keys", "world"), [(4, 1, 2), (6, 2, 4)])
def test_heads_that_do_not_divide(queries: int, keys: int, world: int, tmp_path: Path) -> None:
    """They are refused with numbers, and what the error says to load the model with works."""
    ranks.distributed()
    heads = {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": 16}
    model = helpers.sharp("llama", **heads)
    model.save_pretrained(tmp_path)
    alone = ranks.outcome(model, "adakv+h2o:budget=0.5", IDS, 8)
    parts = ranks.together(world, refused, tmp_path)
    for said, found in parts:
        assert f"has {keys} KV heads, which {world} processes" in said
        ranks.check(alone, found)


def test_a_process_alone_asks_nobody() -> None:
    own = torch.randn(2, 3, 4)
    assert ALONE.gather(own) is own and ALONE.from_first(own) is own
    assert ALONE.objects(own) == [own] and ALONE.most(7) == 7
    assert ALONE.any(True) and not ALONE.any(False)
    assert str(Ranks(1, 2)) == "process 1 of 2"


def test_times_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timeout() == 120 and timeout(7) == 7
    monkeypatch.setenv("KVPRESS_TIMEOUT", "30")
    assert timeout() == 30 and timeout(7) == 7
    monkeypatch.setenv("KVPRESS_TIMEOUT", "soon")
    with pytest.raises(AttachError, match="KVPRESS_TIMEOUT='soon'"):
        timeout()
    with pytest.raises(AttachError, match="timeout=-1"):
        timeout(-1)
