"""Folders for files that can be made again, and compiled files that only this user could write.

What is compiled is executed when it is loaded. So it is loaded only if it and the folders that lead
to it belong to this user or to root, and nobody else may write to them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

from filelock import FileLock

from kvpress import env
from kvpress.errors import BackendError

_LOG = logging.getLogger("kvpress")
_ROOT = 0
_UNKNOWN = 65534  # how a container shows the owner of folders that it was given from outside


def writable(place: str, name: str = "") -> Path:
    """The folder `place` of the cache, made if need be; of another folder where that cannot be.

    It is private, and so is the file `name` in it, if there is one: see `doubt`. The other folders
    are this user's beside temporary files, and one of this process alone. Which one is taken is
    said once. Raises BackendError where no folder can be written to.
    """
    reasons: list[str] = []
    for root in _roots():
        reason = _unusable(root, place, name)
        if not reason:
            if reasons:
                _say(
                    f"{reasons[0]}. {root} is used instead. Set KVPRESS_CACHE to a folder of your"
                    " own, in which nobody else may write."
                )
            return root / place
        reasons.append(reason)
    raise BackendError(
        f"There is no folder for files that can be made again: {'; '.join(reasons)}. Set"
        " KVPRESS_CACHE to a folder of your own, in which nobody else may write."
    )


def made(place: str, name: str, make: Callable[[Path, Path], object]) -> Path:
    """The compiled file `name` in the folder `place` of the cache, made now if need be.

    make: writes the file to the first path that it is given, and to the second, which stays, what
    went wrong. Raises BackendError.
    """
    for root in _lasting_roots():  # which may be read-only
        target = root / place / name
        if target.is_file() and not doubt(target, root):
            return target
    try:
        folder = writable(place, name)
        target, log = folder / name, folder / "build.log"
        with FileLock(folder / "lock"):
            if not target.is_file():
                log.unlink(missing_ok=True)
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    unfinished = Path(scratch) / name
                    make(unfinished, log)
                    unfinished.chmod(0o755)
                    os.replace(unfinished, target)
    except (OSError, NotImplementedError) as error:  # a full disk; a file system without locks
        raise BackendError(f"{name} cannot be made in the cache folder: {error}") from error
    return target


def doubt(path: Path, root: Path) -> str:
    """Why others may have written `path`, which lies below the folder `root`; empty if none may.

    path: resolved, without links.
    """
    if os.name != "posix":
        return ""
    for part in (path, *path.parents):
        found = part.lstat()
        owners = {_ROOT, os.geteuid()} | (set() if part.is_relative_to(root) else {_UNKNOWN})
        if stat.S_ISLNK(found.st_mode):
            return f"{part} is a link"
        if found.st_uid not in owners:
            return f"{part} belongs to another user ({found.st_uid})"
        if _others_write(found):
            return f"{part} can be written by other users"
    return ""


def _others_write(found: os.stat_result) -> bool:
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return False  # there nobody replaces what is not theirs
    shared = found.st_mode & stat.S_IWGRP and not _own_group(found.st_uid, found.st_gid)
    return bool(found.st_mode & stat.S_IWOTH or shared)


def _own_group(user: int, group: int) -> bool:
    """Whether a group has no member but its user, as many systems make one for every user."""
    import grp
    import pwd

    try:
        owner, members = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    same = owner.pw_gid == group and owner.pw_name == members.gr_name
    return same and not set(members.gr_mem) - {owner.pw_name}


def _lasting_roots() -> Iterator[Path]:
    yield Path(os.path.realpath(env.cache_folder()))
    with contextlib.suppress(OSError):  # there is no folder for temporary files
        yield Path(os.path.realpath(env.temporary_folder()))


def _roots() -> Iterator[Path]:
    """Where files may lie, the best first."""
    yield from _lasting_roots()
    with contextlib.suppress(OSError):
        yield _of_this_process()


@functools.cache
def _of_this_process() -> Path:
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="kvpress-")))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _unusable(root: Path, place: str, name: str) -> str:
    """Makes the folder `place` below `root`. Why it cannot be used; empty if it can."""
    folder, file = root / place, root / place / name
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for part in accumulate(Path(place).parts, Path.joinpath, initial=root):
            part.mkdir(mode=0o755, exist_ok=True)
        doubted = doubt(folder, root) or (doubt(file, root) if os.path.lexists(file) else "")
        if not doubted:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"The folder {root} cannot be written to: {error.strerror}"
    return doubted


@functools.cache
def _say(message: str) -> None:
    """Warns, once per process."""
    _LOG.warning("%s", message)
