"""Where compiled files are made and from where they are loaded; builds that fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvpress import env, ops
from kvpress.errors import BackendError, KVPressError
from kvpress.ops import folders

USE = """
import torch
from kvpress import ops
x, allowed = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, dtype=torch.bool)
for _ in range(2):
    ops.match_keys(x, x, allowed)
    ops.channel_scores(x, x, allowed)
print(ops.backends()["cpu"])
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, and a folder for temporary files beside it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("KVPRESS_CACHE", str(tmp_path / "cache"))
    folders._say.cache_clear()
    folders._of_this_process.cache_clear()
    return tmp_path / "cache"


def program(text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "KVPRESS_BACKEND": "", **variables},
        capture_output=True,
        text=True,
    )


def make(text: str) -> object:
    """What `folders.made` calls, for a file with this text."""
    return lambda path, log: path.write_text(text)


def test_a_file_is_made_once_in_the_cache_folder(cache: Path) -> None:
    made = folders.made("native/key", "file.so", make("first"))
    assert made == cache / "native" / "key" / "file.so"
    assert folders.made("native/key", "file.so", make("second")).read_text() == "first"
    assert not made.stat().st_mode & 0o022


@pytest.mark.parametrize("group", [0, 1])
def test_no_file_is_group_writable_whatever_the_umask(cache: Path, group: int) -> None:
    before = os.umask(0o002 if group else 0)
    try:
        made = folders.made("native/key", "file.so", make("ours"))
    finally:
        os.umask(before)
    assert not folders.doubt(made, cache) and not made.stat().st_mode & 0o022


@pytest.mark.parametrize("kind", ["a file is there", "nothing can be made", "no home"])
def test_a_folder_that_cannot_be_written_is_replaced_and_that_is_said_once(
    kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "no home":
        monkeypatch.delenv("KVPRESS_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("none")))
    else:
        cache.write_text("in the way")
        if kind == "nothing can be made":
            monkeypatch.setenv("KVPRESS_CACHE", str(cache / "below"))
    made = folders.made("native/key", "file.so", make("ours"))
    folders.made("native/other", "file.so", make("ours"))
    assert made == env.temporary_folder() / "native" / "key" / "file.so"
    assert len(caplog.records) == (0 if kind == "no home" else 1)


@pytest.mark.parametrize("what", ["file", "folder", "cache"])
@pytest.mark.parametrize("how", ["mode", "owner", "link"])
def test_what_others_could_have_written_is_never_loaded(
    what: str, how: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    planted = folders.made("native/key", "file.so", make("planted"))
    path = {"file": planted, "folder": planted.parent, "cache": cache}[what]
    if how == "mode":
        path.chmod(0o777)
    elif how == "owner":
        if os.getuid():
            pytest.skip("only root can give a file away")
        os.chown(path, 12345, -1)
    else:
        if what == "cache":
            pytest.skip("the user's own link")
        moved = path.rename(path.with_name("moved"))
        path.symlink_to(moved)
    made = folders.made("native/key", "file.so", make("ours"))
    assert made.read_text() == "ours"
    assert made.is_relative_to(env.temporary_folder())
    assert str(path) in caplog.text and "KVPRESS_CACHE" in caplog.text


def test_a_hostile_folder_beside_temporary_files_is_not_used_either(cache: Path) -> None:
    cache.write_text("in the way")
    env.temporary_folder().mkdir()
    env.temporary_folder().chmod(0o777)
    made = folders.made("native/key", "file.so", make("ours"))
    assert not made.is_relative_to(env.temporary_folder())
    assert not folders.doubt(made, made.parents[2])


def test_a_file_in_a_folder_that_is_read_only_is_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = folders.made("native/key", "file.so", make("ours"))
    monkeypatch.setattr(folders, "writable", None)
    assert folders.made("native/key", "file.so", make("others")) == made


def test_without_any_folder_there_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("in the way")
    monkeypatch.setattr("tempfile.tempdir", str(cache))
    with pytest.raises(BackendError, match="Set KVPRESS_CACHE"):
        folders.made("native/key", "file.so", make("ours"))


def test_a_disk_that_is_full_is_a_reason(cache: Path) -> None:
    def full(path: Path, log: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(BackendError, match="No space left"):
        folders.made("native/key", "file.so", full)


def test_a_failed_build_is_one_line_and_a_log_and_said_once(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text(
        "#!/bin/sh\ncase $* in *-fsyntax-only*|*--version*) exit 0;; esac\n"
        "echo tried >> $0.tries; echo 'header.h: no such file' >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    variables = {"CXX": str(compiler), "KVPRESS_CACHE": str(tmp_path / "cache")}
    done = program(USE, **variables)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "PyTorch references" in line]
    assert len(lines) == 1 and len(done.stderr.splitlines()) == 2  # and that it compiles
    (log,) = (tmp_path / "cache").rglob("build.log")
    assert str(log) in lines[0] and "no such file" in log.read_text()
    assert "no such file" not in done.stderr

    command = "import sys; sys.argv[1:] = {}; from kvpress.cli import main; main()"
    shown = program(command.format(["info", "--json"]), **variables)
    assert shown.returncode == 0, shown.stderr
    assert (shown.stdout + shown.stderr).count("build.log") == 1
    assert json.loads(shown.stdout)["operators"]["instruction set"].startswith("none")

    forced = program(USE, KVPRESS_BACKEND="cpu", **variables)
    assert forced.returncode != 0
    assert "BackendError: KVPRESS_BACKEND=cpu cannot run: Compiling" in forced.stderr


def test_a_compiled_file_that_cannot_be_loaded_is_a_reason(tmp_path: Path) -> None:
    text = (
        "from kvpress.ops import build_cpu; from kvpress import ops; import pathlib;"
        f" path = pathlib.Path({str(tmp_path)!r}) / 'operators.so'; path.write_bytes(b'cut short');"
        " build_cpu.build = lambda: path; print(ops.backends()['cpu'])"
    )
    done = program(text)
    assert done.returncode == 0, done.stderr
    assert "reference: " in done.stdout and "cannot be loaded" in done.stdout


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRESS_CPU", "avx521")
    with pytest.raises(KVPressError, match="Did you mean 'avx512'"):
        env.check_instruction_set()


@pytest.mark.skipif(
    shutil.which("c++") is None or env.backend() not in (None, "cpu"), reason="no compiler here"
)
def test_the_operators_compile_where_there_is_a_compiler() -> None:
    assert ops.backends()["cpu"] == "cpu"


@pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="no C++ compiler here")
def test_the_instruction_set_in_use_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.instruction_set() in env.INSTRUCTION_SETS
    done = program("from kvpress import ops; print(ops.instruction_set())", KVPRESS_CPU="portable")
    assert done.stdout.strip() == "portable", done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"KVPRESS_BACKEND": "cpu", "CXX": "no-such-compiler"},
            "BackendError: KVPRESS_BACKEND=cpu",
        ),
        ({"KVPRESS_BACKEND": "gpu"}, "KVPRESS_BACKEND='gpu' names no backend"),
        ({"KVPRESS_CPU": "sse"}, "KVPRESS_CPU='sse' names no instruction set"),
    ],
)
def test_what_is_forced_and_cannot_run_is_refused_at_attach(
    variables: dict[str, str], message: str
) -> None:
    tools = str(Path(__file__).parents[1] / "tools")
    done = program(
        f"import sys; sys.path.append({tools!r}); import helpers, kvpress; model = helpers.tiny();"
        " print('ready'); kvpress.attach(model, 'full')",
        **variables,
    )
    assert "ready" in done.stdout and message in done.stderr
