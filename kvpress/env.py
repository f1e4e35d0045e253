"""The version of the engine, and the environment variables that it reads; all are documented."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kvpress.errors import KVPressError, did_you_mean

__version__ = "0.1.0"
INSTRUCTION_SETS = ("amx", "avx512vnni", "avx512", "avx2", "portable")
VARIABLES = {
    "KVPRESS_CACHE": "folder for converted models and compiled operators (default: the user's cache"
    " folder + /kvpress)",
    "KVPRESS_BACKEND": "force one operator backend: reference, cpu or triton",
    "KVPRESS_TIMEOUT": "seconds until a silent process is given up, where several hold a model"
    " or share a run (default: 120)",
    "KVPRESS_PEERS": "the virtual environment of `kvpress bench peers` (default: .venv-peers)",
    "KVPRESS_CPU": f"the CPU instruction set to use at most: {', '.join(INSTRUCTION_SETS)}",
}


def cache_folder() -> Path:
    """Where files that can be made again are kept; never inside the package.

    It need not exist, nor be writable: `folders.writable` gives one that is.
    """
    chosen = os.environ.get("KVPRESS_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpress"
    except RuntimeError:  # a user without a home, as containers have them
        return temporary_folder()


def temporary_folder() -> Path:
    """This user's folder beside temporary files, for where the cache folder cannot be used."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"kvpress-{user}"


def backend() -> str | None:
    """The backend that `KVPRESS_BACKEND` forces, if any."""
    return os.environ.get("KVPRESS_BACKEND") or None


def check_instruction_set() -> None:
    """Raises KVPressError where `KVPRESS_CPU` names no instruction set."""
    given = os.environ.get("KVPRESS_CPU")
    if given and given not in INSTRUCTION_SETS:
        raise KVPressError(
            f"KVPRESS_CPU={given!r} names no instruction set."
            f"{did_you_mean(given, INSTRUCTION_SETS)}"
        )
