"""Building the CUDA operators with nvcc: at first use, into the user's cache folder, per device.

They exist where Triton cannot do what a GPU can, and are not needed: without nvcc Triton answers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

from kvpress.errors import BackendError
from kvpress.ops import folders
from kvpress.ops.build_cpu import run, sources

FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", "-Xptxas", "-v")


def compiler() -> str | None:
    """nvcc, if there is one."""
    return shutil.which("nvcc")


@functools.cache
def library(source: str, architecture: int) -> ctypes.CDLL:
    """A CUDA source of `kvpress.csrc`, compiled for an architecture (80 for sm_80) and loaded.

    Raises BackendError.
    """
    made = folders.made(
        f"cuda/{_key(source, architecture)}",
        "operator.so",
        lambda out, log: _build(source, architecture, out, log),
    )
    try:
        return ctypes.CDLL(str(made))
    except OSError as error:
        raise BackendError(f"The CUDA operator {made} cannot be loaded: {error}") from error


def build(source: str, architecture: int, out: Path) -> str:
    """Compiles a source to `out`, and returns what the assembler says of registers and spills.

    Raises BackendError; what the compiler said is then beside `out`, in a file that ends in .log.
    """
    return _build(source, architecture, out, out.with_suffix(".log"))


def _build(source: str, architecture: int, out: Path, log: Path) -> str:
    nvcc = compiler()
    if nvcc is None:
        raise BackendError("nvcc was not found. Install the CUDA toolkit, or do with Triton.")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, *FLAGS, target, "-shared", str(sources() / source), "-o", str(out)]
    return run(command, log, f"Compiling {source}")


def _key(source: str, architecture: int) -> str:
    nvcc = compiler()
    version = b""
    if nvcc is not None:
        version = subprocess.run([nvcc, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version + repr((FLAGS, architecture)).encode())
    for path in sorted((sources() / source).parent.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
