"""The environment variables that the engine reads, in one place. Each is listed in the README."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLES = {
    "KVPRESS_CACHE": "folder for converted models and compiled operators (default: the user's cache"
    " folder + /kvpress)",
    "KVPRESS_BACKEND": "force one operator backend: reference, cpu or triton",
    "KVPRESS_PEERS": "the virtual environment of `kvpress bench peers` (default: .venv-peers)",
    "KVPRESS_CPU": "the CPU instruction set to use at most: amx, avx512vnni, avx512, avx2,"
    " portable",
}


def cache_folder() -> Path:
    """Where files that can be made again are kept; never inside the package."""
    chosen = os.environ.get("KVPRESS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpress"


def backend() -> str | None:
    """The backend that `KVPRESS_BACKEND` forces, if any."""
    return os.environ.get("KVPRESS_BACKEND") or None
