"""Sessions of caches in tiers: two files, whole or not there, read at once or when wanted."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from sessions import RECIPES, TIERS, attached, caps, check, data_file, filled, goes_on, same

import kvpress
from kvpress.errors import CacheError, CacheFileError, TierError, TierIntegrityError
from kvpress.store import sealed
from kvpress.store.tiers import beside, record
from kvpress.store.tiers.syscalls import Syscalls


@pytest.fixture(params=["eager", "lazy"])
def lazy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "lazy")


@pytest.mark.parametrize("which", TIERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_session_goes_on_where_it_was(recipe: str, which: str, tmp_path: Path) -> None:
    chat, given = tmp_path / "chat", caps(which, tmp_path / "tier")
    with attached(recipe, given) as engine:
        cache = filled(engine)
        cache.save(chat)
        held = helpers.positions(cache), helpers.positions(cache, 1)
        expected = goes_on(engine, cache)
    del cache
    engine.spec.tiers.vault and engine.spec.tiers.vault.close()
    with attached(recipe, given) as other:
        for lazy in (False, True):
            if lazy and which == "device":
                with pytest.raises(CacheFileError, match="attach the engine with device= and host"):
                    other.load_cache(chat, lazy=True)
                continue
            loaded = other.load_cache(chat, lazy=lazy)
            check(other, loaded)
            assert (helpers.positions(loaded), helpers.positions(loaded, 1)) == held
            assert same(goes_on(other, loaded), expected)
            check(other, loaded)
            del loaded
            gc.collect()
    assert {p.name for p in tmp_path.iterdir()} - {"tier"} == {"chat", data_file(chat).name}


@pytest.mark.parametrize("recipe", RECIPES)
def test_pages_that_rows_share_are_written_once(recipe: str, tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    with attached(recipe, caps("host and disk", tmp_path / "tier")) as engine:
        cache = filled(engine, batch=1)
        cache.save(chat)
        alone = data_file(chat).stat().st_size
        cache.batch_repeat_interleave(4)
        cache.save(chat)
        assert data_file(chat).stat().st_size == alone
        fork = cache.fork()
        expected = goes_on(engine, cache, [torch.tensor([[5], [6], [7], [8]])])
        fork.save(chat)
        assert data_file(chat).stat().st_size == alone
        loaded = engine.load_cache(chat, lazy=True)
        assert same(goes_on(engine, loaded, [torch.tensor([[5], [6], [7], [8]])]), expected)
        check(engine, loaded)


OPERATIONS = ("steps", "chunk", "crop", "fork", "beams", "some", "save", "save and load")


@pytest.mark.parametrize("recipe", [*RECIPES, "h2o:budget=200,interval=5"])
@torch.no_grad()
def test_whatever_happens_to_a_loaded_session_it_stays_what_it_would_be(
    recipe: str, tmp_path: Path
) -> None:
    """Continued, evicted, cropped, forked, reordered, saved over the file that it is read from."""
    chat, draw = tmp_path / "chat", random.Random(recipe)
    with (
        attached(recipe, caps("disk", tmp_path / "tier", "900KiB")) as engine,
        attached(recipe, caps("device", tmp_path)) as plain,
    ):
        cache, twin = filled(engine, 400), filled(plain, 400)
        cache.save(chat)
        cache = engine.load_cache(chat, lazy=True)
        for turn in range(24):
            batch, seed = cache.batch_size, draw.randrange(99)
            what = draw.choice(OPERATIONS)
            if what in ("steps", "chunk"):
                ids = helpers.prompt(batch, 3 if what == "steps" else draw.randrange(2, 70), seed)
                steps = ids.split(1, dim=1) if what == "steps" else [ids]
                given, expected = goes_on(engine, cache, steps), goes_on(plain, twin, steps)
                torch.testing.assert_close(given, expected, rtol=0, atol=0, msg=f"{turn} {what}")
            elif what == "crop":
                refused = []
                for one in (cache, twin):
                    try:
                        one.crop(-3)
                    except CacheError as error:
                        refused.append(str(error))
                assert refused in ([], refused[:1] * 2)
            elif what == "fork":
                cache, twin = cache.fork(), twin.fork()
            elif what == "beams" and batch < 5:
                for one in (cache, twin):
                    one.batch_repeat_interleave(2)
            elif what in ("beams", "some"):
                index = torch.tensor(draw.choices(range(batch), k=2))
                for one in (cache, twin):
                    one.batch_select_indices(index)
            else:
                cache.save(chat)
                if "load" in what:
                    cache = engine.load_cache(chat, lazy=draw.random() < 0.7)
            check(engine, cache)
        assert helpers.positions(cache) == helpers.positions(twin)


def test_files_may_go_or_change_under_a_session_that_is_read(tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    with attached("full", caps("host", tmp_path / "tier", "1200KiB")) as engine:
        cache = filled(engine)
        cache.save(chat)
        expected = goes_on(engine, cache)
        gone, replaced, moved = (engine.load_cache(chat, lazy=True) for _ in range(3))
        folder = tmp_path / "moved"
        folder.mkdir()
        for file in (chat, data_file(chat)):
            shutil.copy(file, folder)
        filled(engine, 200).save(chat)  # the data file that was there is removed
        assert same(goes_on(engine, replaced), expected)
        for file in (data_file(chat), chat):
            file.unlink()
        assert same(goes_on(engine, gone), expected)
        moved.save(tmp_path / "other")
        assert same(goes_on(engine, engine.load_cache(tmp_path / "other")), expected)
        assert same(goes_on(engine, engine.load_cache(folder / "chat", lazy=True)), expected)


def test_a_session_is_closed_with_the_last_that_reads_it(tmp_path: Path) -> None:
    chat = tmp_path / "chat"

    def open_files() -> int:
        names = (x for x in Path("/proc/self/fd").iterdir() if x.is_symlink())
        return sum(os.readlink(x).startswith(str(chat)) for x in names)

    with attached("full", caps("host", tmp_path / "tier")) as engine:
        filled(engine).save(chat)
        assert not open_files()
        loaded = engine.load_cache(chat, lazy=True)
        assert open_files()
        loaded.reset()
        del loaded
        gc.collect()
        engine.spec.tiers.collect()
        gc.collect()
        assert not open_files()
        engine.load_cache(chat)
        gc.collect()
        assert not open_files()


# Refusals


def saved(tmp_path: Path, which: str = "host", recipe: str = "full") -> tuple[Any, Path, Any]:
    """An engine, a session of it, and logits with which it goes on."""
    engine = attached(recipe, caps(which, tmp_path / "tier"))
    cache = filled(engine, 400)
    cache.save(tmp_path / "chat")
    return engine, tmp_path / "chat", goes_on(engine, cache)


def test_sessions_and_plain_files_do_not_mix(tmp_path: Path) -> None:
    engine, chat, _ = saved(tmp_path)
    engine.detach()
    plain = attached("full", {})
    with pytest.raises(CacheFileError, match=r"by an engine with tiers .* Attach an engine with"):
        plain.load_cache(chat)
    with pytest.raises(CacheFileError, match="lazy=True reads pages through the host"):
        plain.load_cache(chat, lazy=True)
    filled(plain, 100).save(chat)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["chat"]  # no data file is left
    other = attached("full", caps("host", tmp_path / "tier"))
    with pytest.raises(CacheFileError, match=r"engine without tiers .* Attach an engine without"):
        other.load_cache(chat)


def test_sessions_of_others_are_refused(tmp_path: Path, lazy: bool) -> None:
    engine, chat, _ = saved(tmp_path)
    engine.detach()
    given = caps("host", tmp_path / "tier")
    turned = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    for message, recipe, fields in (
        ("policy=.*Attach the engine with that policy", "quant:residual=8", {}),
        ("Load the model that it was made with", "full", {"num_hidden_layers": 1}),
        ("with the same config", "full", turned),
    ):
        with pytest.raises(CacheFileError, match=message):
            attached(recipe, given, **fields).load_cache(chat, lazy=lazy)
    half = kvpress.attach(
        helpers.tiny(num_hidden_layers=2), "full", cache_dtype=torch.bfloat16, **given
    )
    with pytest.raises(CacheFileError, match=r"has pages of .*cache_dtype=\) and rotary settings"):
        half.load_cache(chat, lazy=lazy)


def test_another_layout_of_pages_is_refused(
    tmp_path: Path, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, chat, _ = saved(tmp_path)
    contents = sealed.read(chat)
    contents.facts["pages"]["layout"] = record.LAYOUT + 1
    sealed.write(chat, contents.tensors, contents.facts)
    with pytest.raises(CacheFileError, match="layout 2, but here it is 1"):
        engine.load_cache(chat, lazy=lazy)


def test_a_data_file_that_is_not_the_right_one_is_refused(tmp_path: Path, lazy: bool) -> None:
    engine, chat, expected = saved(tmp_path)
    data = data_file(chat)
    whole = data.read_bytes()
    filled(engine, 300).save(tmp_path / "two")
    before = engine.cache
    other = data_file(tmp_path / "two").read_bytes()
    head = bytearray(whole)
    head[4000] ^= 1
    for reason, content in {
        "it was cut off": whole[:-4096],
        "cut off or added to": whole + bytes(4096),
        "instead of": b"",
        "belongs to the save": (other + bytes(len(whole)))[: len(whole)],
        "head is damaged": bytes(head),
        "it is no data file": bytes(len(whole)),
        "which cannot be read": None,
    }.items():
        data.unlink(missing_ok=True)
        if content is not None:
            data.write_bytes(content)
        with pytest.raises(CacheFileError, match=reason):
            engine.load_cache(chat, lazy=lazy)
    assert engine.cache is before
    data.write_bytes(whole)
    assert same(goes_on(engine, engine.load_cache(chat, lazy=lazy)), expected)


@pytest.mark.parametrize("recipe", ["full", "keyformer:budget=0.5+quant:residual=8"])
def test_corrupted_pages_are_never_attended_to(recipe: str, tmp_path: Path, lazy: bool) -> None:
    """Bit flips all over the data file: a typed error, or what is wrong was not needed."""
    from kvpress.hf.cache_file import layer_devices

    engine, chat, expected = saved(tmp_path, "host", recipe)
    data, draw = data_file(chat), random.Random(2)
    whole, refused, cache = data.read_bytes(), 0, filled(engine, 100)
    steps = helpers.prompt(2, 3, seed=9).split(1, dim=1)
    untouched = goes_on(engine, cache.fork(), steps)
    places = [draw.randrange(4096, len(whole)) for _ in range(60)]
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1 << draw.randrange(8)
        data.write_bytes(altered)
        try:
            if lazy:
                assert same(goes_on(engine, engine.load_cache(chat, lazy=True)), expected)
            else:
                cache.load(chat, layer_devices(engine.model))
        except (CacheFileError, TierIntegrityError) as error:
            assert "checksum is wrong" in str(error)
            refused += 1
    assert refused == len(places) if not lazy else refused > len(places) // 2
    check(engine, cache)
    assert same(goes_on(engine, cache, steps), untouched)


def test_pages_that_go_bad_later_are_a_typed_error(tmp_path: Path) -> None:
    engine, chat, _ = saved(tmp_path)
    loaded = engine.load_cache(chat, lazy=True)
    with open(data_file(chat), "r+b") as file:
        file.seek(4096)
        file.write(bytes(data_file(chat).stat().st_size - 4096))
    with pytest.raises(TierIntegrityError, match=r"of the session's data file .*chat\..*\.pages"):
        goes_on(engine, loaded)
    with pytest.raises(CacheError, match="interrupted"):
        loaded.save(chat)


def test_a_session_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    engine, chat, _ = saved(tmp_path, "host")
    engine.detach()
    small = attached("full", {"device": "600KiB", "host": "64KiB"})
    with pytest.raises(TierError, match=r"(host=|Raise)"):
        small.load_cache(chat)
    gc.collect()
    small.spec.tiers.collect()
    assert small.spec.tiers.vault.bytes_host == 0
    with pytest.raises(TierError, match="no room for what is read from a session"):
        small.load_cache(chat, lazy=True)


def test_manifests_that_cannot_be_are_refused_or_change_nothing(tmp_path: Path) -> None:
    import importlib.util as loading

    spec: Any = loading.spec_from_file_location(
        "impossible", Path(__file__).with_name("test_impossible_files.py")
    )
    impossible = loading.module_from_spec(spec)
    spec.loader.exec_module(impossible)
    engine, chat, expected = saved(tmp_path, "host", "keyformer:budget=0.5+quant:residual=8")
    contents, other, data = sealed.read(chat), tmp_path / "other", data_file(chat)
    shutil.copy(data, beside.name_of(other, bytes.fromhex(contents.facts["pages"]["id"])))
    random.seed(5)
    edits = [
        edit
        for edit in impossible.edits_of_tensors(contents.tensors)
        if "record" in edit[0] or "session" in edit[0] or "place" in edit[0] or "old" in edit[0]
    ]
    loaded = 0
    for what, edit in random.sample(edits, 150):
        tensors = {name: tensor.clone() for name, tensor in contents.tensors.items()}
        edit({}, tensors)
        sealed.write(other, tensors, contents.facts)
        try:
            cache = engine.load_cache(other, lazy=random.random() < 0.5)
            assert same(goes_on(engine, cache), expected), what
            loaded += 1
        except (CacheFileError, TierIntegrityError):
            continue
    assert loaded < 60


# Writing


class Refusing(Syscalls):
    """A file system that cannot copy from file to file, or only fails to."""

    def reflink(self, *_: int) -> None:
        raise OSError(95, "Operation not supported")

    def copy_range(self, *_: int) -> int:
        raise OSError(18, "Invalid cross-device link")


@pytest.mark.parametrize("which", ["disk", "host and disk"])
def test_what_the_kernel_cannot_copy_passes_through_memory(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvpress.store.tiers import data_file as module

    chat = tmp_path / "chat"
    with attached("full", caps(which, tmp_path / "tier")) as engine:
        cache = filled(engine)
        monkeypatch.setattr(module, "Syscalls", Refusing)
        cache.save(chat)
        monkeypatch.undo()
        by_memory = data_file(chat).read_bytes()
        cache.save(chat)
        by_kernel = data_file(chat).read_bytes()
        assert by_memory[4096:][:8192] == by_kernel[4096:][:8192]  # of the same records
        assert same(goes_on(engine, engine.load_cache(chat)), goes_on(engine, cache))


@pytest.mark.parametrize("call", ["pwritev", "copy_range", "sync_data", "open"])
def test_a_session_that_cannot_be_written_leaves_the_old_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, chat, expected = saved(tmp_path, "disk")
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    cache = filled(engine, 500)
    monkeypatch.setattr(Syscalls, call, full)
    with pytest.raises(CacheFileError, match=r"No space left.*Nothing was changed"):
        cache.save(chat)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    assert same(goes_on(engine, engine.load_cache(chat)), expected)


def test_what_dead_processes_left_is_removed_and_what_others_write_stays(tmp_path: Path) -> None:
    import fcntl

    engine, chat, _ = saved(tmp_path)
    left, busy, own = (beside.name_of(chat, bytes([n] * 16)) for n in range(3))
    foreign = tmp_path / "chat.notes.pages"
    of_another = beside.name_of(tmp_path / "chat.chat", bytes(16))
    for file in (left, busy, foreign, of_another, tmp_path / ".chat.01234567.partial"):
        file.write_bytes(b"x")
    with open(busy) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine.cache.save(chat)
        assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {
            *("chat", data_file_of(chat).name, busy.name, foreign.name, of_another.name)
        }
    engine.cache.save(chat)
    assert not busy.exists() and not own.exists()


def data_file_of(manifest: Path) -> Path:
    return beside.name_of(manifest, bytes.fromhex(beside.named_by(manifest) or ""))


def test_sessions_are_private_and_follow_links(tmp_path: Path) -> None:
    engine, _, expected = saved(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "chat")
    engine.load_cache(tmp_path / "chat").save(tmp_path / "link")
    real = tmp_path / "there" / "chat"
    assert {oct(p.stat().st_mode & 0o777) for p in (real, data_file(real))} == {"0o600"}
    assert same(goes_on(engine, engine.load_cache(tmp_path / "link", lazy=True)), expected)


KILLS = Path(__file__).parents[1] / "tools" / "kills.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_while_saving_leaves_the_old_session_or_the_new_one(
    tmp_path: Path,
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # other threads do not survive a fork
    command = [sys.executable, str(KILLS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, old, new = map(int, done.stdout.split()[-3:])
    # How many of each depends on what else the machine does: both must have been seen.
    assert kills >= 200 and old > 5 and new > 5, done.stdout


MEMORY = Path(__file__).parents[1] / "tools" / "session_memory.py"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_saving_and_loading_needs_little_memory_besides_the_tiers(tmp_path: Path) -> None:
    """96 MiB of keys and values, with a device of 8 MiB and a host of 8 MiB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(MEMORY), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    grown = dict(zip(("save", "lazy", "eager"), map(int, done.stdout.split()[-3:]), strict=True))
    assert grown["save"] < 12 << 20, grown
    assert grown["lazy"] < 12 << 20, grown
    assert grown["eager"] < 28 << 20, grown  # with the tiers that it fills
