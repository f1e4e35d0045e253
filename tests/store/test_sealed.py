"""Sealed files: whole or not at all, read once, ordinary files only, and nothing is left behind."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvpress.errors import CacheFileError
from kvpress.store import sealed

FACTS = {"name": "one", "numbers": [1, None, 2.5], "text": 'a "checksum" of ü'}


def tensors() -> dict[str, Tensor]:
    return {
        "a.bytes": torch.arange(5, dtype=torch.uint8),
        "b.half": torch.randn(3, 2).bfloat16(),
        "c.none": torch.zeros(0, 7),
        "d.one": torch.tensor(7),
        "e.flags": torch.tensor([True, False]),
        "f.turned": torch.randn(4, 3).double().T,
        "g.float": torch.randn(2).half(),
        "h.short": torch.tensor([[-1]], dtype=torch.int16),
        "i.int": torch.tensor([2**31 - 1, -5], dtype=torch.int32),
    }


def test_what_is_read_is_what_was_written_and_safetensors_reads_it_too(tmp_path: Path) -> None:
    given = tensors()
    sealed.write(tmp_path / "file", given, FACTS)
    contents = sealed.read(tmp_path / "file")
    assert contents.facts == FACTS
    for read in (contents.tensors, load_file(tmp_path / "file")):
        assert read.keys() == given.keys()
        for name, tensor in given.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def test_every_single_byte_is_under_the_checksum(tmp_path: Path) -> None:
    """The first one behind the header as well, and those of the checksum itself."""
    file = tmp_path / "file"
    sealed.write(file, tensors(), FACTS)
    whole = file.read_bytes()
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1
        file.write_bytes(altered)
        with pytest.raises(CacheFileError, match="cut off or altered"):
            sealed.read(file)
    file.write_bytes(whole)
    assert sealed.read(file).facts == FACTS


def resealed(header: Any, data: bytes) -> bytes:
    """A file with a right checksum, whatever stands in it."""
    import xxhash

    text = json.dumps(header, separators=(",", ":")).encode()
    start = struct.pack("<Q", len(text))
    seal = xxhash.xxh3_128(start + text + data).hexdigest().encode()
    return start + text.replace(b"0" * 32, seal, 1) + data


BLANK = {"checksum": "0" * 32}
ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
HEADERS: dict[str, Any] = {
    "a list": [{"checksum": "0" * 32}],
    "no metadata": {"x": {**ONE, **BLANK}},
    "metadata are a list": {"__metadata__": [BLANK], "x": ONE},
    "metadata are numbers": {"__metadata__": {**BLANK, "n": 3}, "x": ONE},
    "metadata are no JSON": {"__metadata__": {**BLANK, "n": "{"}, "x": ONE},
    "deep": {"__metadata__": {**BLANK, "n": "[" * 100000}, "x": ONE},
    "an unknown type": {"__metadata__": BLANK, "x": {**ONE, "dtype": "F3"}},
    "a type that is a list": {"__metadata__": BLANK, "x": {**ONE, "dtype": ["U8"]}},
    "a null": {"__metadata__": BLANK, "x": None},
    "a negative shape": {"__metadata__": BLANK, "x": {**ONE, "shape": [-1]}},
    "a shape of floats": {"__metadata__": BLANK, "x": {**ONE, "shape": [1.0]}},
    "a shape of booleans": {"__metadata__": BLANK, "x": {**ONE, "shape": [True]}},
    "a huge shape": {"__metadata__": BLANK, "x": {**ONE, "shape": [2**62, 2**62]}},
    "a huge empty shape": {
        "__metadata__": BLANK,
        "x": ONE,
        "y": {"dtype": "U8", "shape": [2**62, 2**62, 0], "data_offsets": [1, 1]},
    },
    "many dimensions": {"__metadata__": BLANK, "x": {**ONE, "shape": [1] * 100}},
    "another size": {"__metadata__": BLANK, "x": {**ONE, "shape": [2]}},
    "an overlap": {"__metadata__": BLANK, "x": ONE, "y": ONE},
    "a gap": {"__metadata__": BLANK, "x": {**ONE, "data_offsets": [1, 2]}},
    "too little": {"__metadata__": BLANK},
    "three offsets": {"__metadata__": BLANK, "x": {**ONE, "data_offsets": [0, 1, 1]}},
    "another field": {"__metadata__": BLANK, "x": {**ONE, "more": 1}},
    "no boolean": {"__metadata__": BLANK, "x": {**ONE, "dtype": "BOOL"}},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_cannot_be_are_refused_whatever_the_checksum(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(resealed(HEADERS[name], b"\x07"))
    with pytest.raises(CacheFileError, match="cut off or altered"):
        sealed.read(tmp_path / "file")
    (tmp_path / "file").write_bytes(resealed({"__metadata__": BLANK, "x": ONE}, b"\x07"))
    assert sealed.read(tmp_path / "file").tensors["x"].tolist() == [7]


def test_what_was_read_is_no_view_of_the_file(tmp_path: Path) -> None:
    file, given = tmp_path / "file", tensors()
    sealed.write(file, given, FACTS)
    read = sealed.read(file).tensors
    with open(file, "r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
        opened.truncate(0)  # reading a mapped file would now end the process
    assert all(torch.equal(read[name], tensor) for name, tensor in given.items())


def test_a_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise another one could come into its place between the check and the use."""
    sealed.write(tmp_path / "file", tensors(), FACTS)
    opened, given = [], os.open

    def counted(path: Any, *arguments: Any, **options: Any) -> int:
        opened.append(path)
        return given(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    sealed.read(tmp_path / "file")
    assert len(opened) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    began = time.monotonic()
    for path in (tmp_path / "pipe", tmp_path / "folder", tmp_path / "link", "/dev/zero"):
        with pytest.raises(CacheFileError, match="no ordinary file"):
            sealed.read(path)
        with pytest.raises(CacheFileError, match="no ordinary file"):
            sealed.write(path, tensors(), FACTS)
    assert time.monotonic() - began < 60
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    sealed.write(tmp_path / "link", tensors(), FACTS)
    assert (tmp_path / "link").is_symlink()
    assert sealed.read(tmp_path / "elsewhere" / "file").facts == FACTS


def test_a_tilde_is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sealed.write("~/file", tensors(), FACTS)
    assert (tmp_path / "file").exists()
    assert sealed.read(Path("~/file")).facts == sealed.read("~/file").facts == FACTS


def test_what_is_no_path_is_refused() -> None:
    for given in (None, 3, b"file", "a\0b"):
        with pytest.raises(CacheFileError):
            sealed.read(given)
        with pytest.raises(CacheFileError):
            sealed.write(given, tensors(), FACTS)


def test_a_full_disk_is_an_error_of_the_engine_and_changes_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file = tmp_path / "file"
    sealed.write(file, tensors(), FACTS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CacheFileError, match=r"cannot be written: .*Nothing was changed"):
            sealed.write(file, {"large": torch.zeros(10**6)}, FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sealed.read(file).facts == FACTS
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(CacheFileError, match=r"cannot be written.*folder that exists"):
        sealed.write(tmp_path / "no folder" / "file", tensors(), FACTS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    """Not what another process is writing, and not what belongs to somebody else."""
    import fcntl

    file = tmp_path / "file[1]"
    for name in (".file[1].abcdefgh.partial", ".file[1].x.partial", ".other.abcdefgh.partial"):
        (tmp_path / name).write_bytes(b"half")
    os.mkfifo(tmp_path / ".file[1].12345678.partial")
    with open(tmp_path / ".file[1].ijklmnop.partial", "wb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        sealed.write(file, tensors(), FACTS)
        assert ".file[1].ijklmnop.partial" in os.listdir(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        ".file[1].12345678.partial",
        ".file[1].ijklmnop.partial",
        ".file[1].x.partial",
        ".other.abcdefgh.partial",
        "file[1]",
    ]
    sealed.write(file, tensors(), FACTS)
    assert ".file[1].ijklmnop.partial" not in os.listdir(tmp_path)


def test_a_file_that_is_being_written_is_not_taken_for_one_that_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process writes the same file at the same time, at the worst of moments."""
    file, given, done = tmp_path / "file", sealed._write, []

    def interrupted(*arguments: Any) -> None:
        if not done:
            done.append(True)
            sealed.write(file, {"x": torch.zeros(3)}, FACTS)
        given(*arguments)

    monkeypatch.setattr(sealed, "_write", interrupted)
    sealed.write(file, tensors(), FACTS)
    assert sealed.read(file).tensors.keys() == tensors().keys()
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_file_is_private_unless_it_is_for_others(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        sealed.write(tmp_path / "private", tensors(), FACTS)
        sealed.write(tmp_path / "shared", tensors(), FACTS, private=False)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("private", "shared")]
    assert modes == [0o600, 0o666 & ~umask]
