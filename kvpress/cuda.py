"""Building the CUDA operators with nvcc: at first use, into the user's cache folder, per device.

They exist where Triton cannot do what a GPU can, and are not needed: without nvcc Triton answers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from kvpress.env import cache_folder
from kvpress.errors import BackendError
from kvpress.native import sources

FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-Xptxas", "-v")


def compiler() -> str | None:
    """nvcc, if there is one."""
    return shutil.which("nvcc")


@functools.cache
def library(source: str, architecture: int) -> ctypes.CDLL:
    """A CUDA source of `kvpress.csrc`, compiled for an architecture (80 for sm_80) and loaded.

    Raises BackendError.
    """
    key = _key(source, architecture)
    folder = cache_folder() / "cuda" / key
    made = folder / "operator.so"
    if not made.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not made.is_file():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    compiled = Path(scratch) / "operator.so"
                    build(source, architecture, compiled)
                    os.replace(compiled, made)
    return ctypes.CDLL(str(made))


def build(source: str, architecture: int, out: Path) -> str:
    """Compiles a source, and returns what the assembler says of registers and spills.

    Raises BackendError.
    """
    nvcc = compiler()
    if nvcc is None:
        raise BackendError("nvcc was not found. Install the CUDA toolkit, or do with Triton.")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, *FLAGS, target, "-shared", str(sources() / source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        raise BackendError(f"nvcc failed: {' '.join(command)}\n{tail}")
    return done.stderr


def _key(source: str, architecture: int) -> str:
    nvcc = compiler()
    version = b""
    if nvcc is not None:
        version = subprocess.run([nvcc, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version + repr((FLAGS, architecture)).encode())
    for path in sorted((sources() / source).parent.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
