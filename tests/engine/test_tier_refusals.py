"""Caps that cannot work are refused with numbers, and what is too much leaves nothing behind."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import tiered
import tiers
import torch

import kvpress
from kvpress.store.tiers.syscalls import Syscalls

FINE = {"device": "64MiB"}


def refused(error: type[Exception], match: str, recipe: str = "full", **given: Any) -> str:
    """What an attach says that is refused; the model is as it was, and no thread is left."""
    model, threads = given.pop("model", None) or tiered.model(), tiered.threads()
    before, hooks = model.config._attn_implementation, len(model._forward_hooks)
    with pytest.raises(error, match=match) as raised:
        kvpress.attach(model, recipe, **given)
    assert model.config._attn_implementation == before and len(model._forward_hooks) == hooks
    assert tiered.threads() <= threads
    return str(raised.value)


@pytest.mark.parametrize(
    "size", ["", "much", "-1", -1, "12 parsecs", "1e400GiB", "nan", 1.5, True, "512MiB:here"]
)
@pytest.mark.parametrize("name", ["device", "host"])
def test_what_is_no_size(name: str, size: Any) -> None:
    text = refused(kvpress.TierError, f"{name}=.* is no size", **({**FINE, name: size}))
    assert repr(size) in text and "512MiB" in text


@pytest.mark.parametrize("disk", ["", "20GiB", ":", "20GiB:", ":/tmp", "x:/tmp", "-1GiB:/tmp", 7])
def test_what_is_no_disk(disk: Any) -> None:
    refused(kvpress.TierError, "disk=.* cannot be read.*20GiB:/scratch", **FINE, disk=disk)


def test_lower_tiers_need_a_device() -> None:
    refused(kvpress.TierError, "without device=", host="1GiB")
    refused(kvpress.TierError, "without device=", disk="1GiB:/tmp")


def test_the_least_device_that_is_named_is_enough(tmp_path: Path) -> None:
    """Also where layers have pages of several sizes."""
    cases = (32, "full"), (128, "quest:read=96"), (32, "quest:read=96,page=64"), (128, "leoam")
    for width, recipe in cases:
        model = tiered.model(width=width)
        least, _ = tiered.least(model, recipe)
        caps = {"device": least, "host": "16MiB", "disk": f"32MiB:{tmp_path}"}
        with tiered.attached(model, recipe, caps) as engine:
            cache = engine.new_cache()
            logits = tiered.feed(model, cache, helpers.prompt(1, 700), [700])
            tiered.decode(model, cache, logits[-1], 3)
            tiered.check(engine, cache)


@pytest.mark.parametrize("recipe", ["full", "quant", "snapkv:budget=0.5", "think+quant"])
@pytest.mark.parametrize("size", [0, 1, 4096, "100KiB"])
def test_a_device_that_is_too_small(recipe: str, size: Any) -> None:
    model = tiered.model()
    if size == "100KiB":
        size = tiered.least(model, recipe)[0] - 1
    text = refused(kvpress.TierError, "at least device=", recipe, device=size, host="16MiB")
    assert f"device={size}" in text.replace("device='", "device=")


@pytest.mark.parametrize("recipe", ["full", "quant", "h2o:budget=0.5", "think", "keyformer+quant"])
@pytest.mark.parametrize("shape", [(4, 4, 32), (4, 1, 64)], ids=str)
def test_what_the_error_says_is_enough(recipe: str, shape: tuple[int, ...]) -> None:
    """A prompt in chunks and some tokens, on just as many bytes."""
    model = tiered.model(*shape)
    for sequences in (1, 3):
        device, _ = tiered.least(model, recipe, sequences)
        with tiered.attached(model, recipe, {"device": device, "host": "32MiB"}) as engine:
            cache = engine.new_cache()
            found = tiered.feed(model, cache, helpers.prompt(sequences, 500), [190, 170, 140])
            tiered.decode(model, cache, found[-1], 3)
            tiered.check(engine, cache)


@pytest.mark.parametrize("recipe", ["full", "quant", "quest:dense=0", "snapkv:budget=0.5"])
@pytest.mark.parametrize("disk", [False, True])
def test_a_host_that_is_too_small(recipe: str, disk: bool, tmp_path: Path) -> None:
    """It is refused at once, by the largest record; what is named then is enough."""
    model, lower = tiered.model(), {"disk": f"64MiB:{tmp_path}"} if disk else {}
    for host in (1, "20KiB"):
        text = refused(
            kvpress.TierError, "records of up to", recipe, model=model, **FINE, host=host, **lower
        )
    least = int(text.partition("at least host=")[2].partition(",")[0])
    refused(
        kvpress.TierError, f"host={least}", recipe, model=model, **FINE, host=least - 1, **lower
    )
    device, _ = tiered.least(model, recipe)
    if not disk:
        least *= 32  # there must be room for what does not stay on the device
    with tiered.attached(model, recipe, {"device": device, "host": least, **lower}) as engine:
        cache = engine.new_cache()
        found = tiered.feed(model, cache, helpers.prompt(1, 500), [500])
        tiered.decode(model, cache, found[-1], 3)
        assert tiered.below(cache)
        tiered.check(engine, cache)


def test_records_that_are_too_large_for_the_way_to_a_disk(tmp_path: Path) -> None:
    recipe, disk = "quest:dense=0,page=1024", f"1GiB:{tmp_path}"
    model = tiered.model(16, 16, 256)
    refused(kvpress.TierError, "Leave disk= out", recipe, model=model, device="2GiB", disk=disk)


def test_folders_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    refused(kvpress.TierError, "is no folder", **FINE, disk=f"1MiB:{file}")
    refused(kvpress.TierError, "does not exist", **FINE, disk=f"1MiB:{tmp_path}/none")
    assert tiers.left(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: Any) -> None:
    # Tests may run as a user who may write everywhere.
    denied = OSError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Syscalls, "open", lambda *_: (_ for _ in ()).throw(denied))
    refused(kvpress.TierError, "cannot hold a disk tier.*denied", **FINE, disk=f"1MiB:{tmp_path}")
    assert tiers.left(tmp_path) == []


def test_a_disk_that_is_full_at_start(tmp_path: Path) -> None:
    text = refused(kvpress.TierError, "are free", **FINE, disk=f"900000GiB:{tmp_path}")
    assert str(900000 << 30) in text and tiers.left(tmp_path) == []


def test_a_folder_that_another_process_uses(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from kvpress.store.tiers.folder import FolderLock\n"
        "from kvpress.store.tiers.syscalls import Syscalls\n"
        "lock = FolderLock(pathlib.Path(sys.argv[1]), bytes(16), Syscalls())\n"
        "print('locked', flush=True); sys.stdin.read()\n"
    )
    command, pipe = [sys.executable, "-c", code, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        text = refused(kvpress.TierError, "is used by process", **FINE, disk=f"1MiB:{tmp_path}")
        assert str(other.pid) in text
        other.kill()
    with tiered.attached(tiered.model(), "full", {**FINE, "disk": f"1MiB:{tmp_path}"}):
        assert tiers.left(tmp_path) == ["kvpress.lock"]
    assert tiers.left(tmp_path) == []


def test_engines_one_after_the_other_use_one_folder(tmp_path: Path) -> None:
    """Also where one is left that nobody has closed, or that is still used."""
    caps, ids = {**FINE, "disk": f"4MiB:{tmp_path}"}, helpers.prompt(1, 200)
    for recipe in ("full", "quant", "full"):
        with kvpress.attach(tiered.model(), recipe, **caps) as engine, torch.no_grad():
            engine.model(ids)
            assert engine.cache.check_integrity()


@pytest.mark.parametrize(
    ("recipe", "family", "error", "match"),
    [
        ("d2o:budget=0.4", "llama", kvpress.PolicyError, "merges into stored slots"),
        ("snapkv:budget=2MiB", "llama", kvpress.PolicyError, "budget in bytes"),
        ("full", "bloom", kvpress.PolicyError, "ALiBi"),
        ("full", "mpt", kvpress.PolicyError, "ALiBi"),
        ("full", "mistral-sliding", kvpress.TierError, "sliding-window layers"),
    ],
)
def test_what_cannot_be_in_tiers(recipe: str, family: str, error: Any, match: str) -> None:
    refused(error, match, recipe, model=helpers.tiny(family), device="64MiB", host="64MiB")


@pytest.mark.parametrize("lower", [False, True])
def test_more_than_all_tiers_hold(lower: bool, tmp_path: Path) -> None:
    """The prompt fails, the cache says so, and goes on when it is emptied."""
    model = tiered.model()
    caps = tiered.caps("both", model, "full", 1, tmp_path)
    if lower:
        caps["disk"] = f"{caps['host'] // 2}B:{tmp_path}"
    else:
        caps = {"device": caps["device"]}
    with tiered.attached(model, "full", caps) as engine:
        cache, own = engine.new_cache(), engine.spec.tiers
        with pytest.raises(kvpress.TierError, match="Raise"):
            tiered.feed(model, cache, helpers.prompt(1, 2000), [100] * 20)
        with pytest.raises(kvpress.CacheError, match="reset"):
            tiered.feed(model, cache, helpers.prompt(1, 1), [1])
        cache.reset()
        assert tiered.used(own) == (0, 0, 0)
        found = tiered.feed(model, cache, helpers.prompt(1, 120), [60, 60])
        tiered.check(engine, cache)
        assert tiered.nothing_stays_in_flight(own)
    with kvpress.attach(model, "full") as engine:
        plain = tiered.feed(model, engine.new_cache(), helpers.prompt(1, 120), [60, 60])
    assert tiered.tokens(found) == tiered.tokens(plain)
