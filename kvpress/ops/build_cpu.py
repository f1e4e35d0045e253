"""Building the CPU operators: at first use, into the user's cache folder, once per combination.

The key of a build is everything that it depends on: sources, flags, compiler, torch, machine and
CPU features. Nothing is ever written into the package.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from kvpress.errors import BackendError
from kvpress.ops import folders, versions

_LOG = logging.getLogger("kvpress")
_WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized")
_ALIGNED = (
    "-falign-functions=64",
    "-falign-loops=64",
)  # hot loops lose up to 8 % by where they fall
_COMMON = ("-std=c++17", "-O3", "-fPIC", *_ALIGNED, *_WARNINGS)
_TORCH = (2, 10)  # the oldest with the stable functions that the binding calls
_X86 = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}


def build() -> Path:
    """The compiled operators, compiled now if need be. Raises BackendError where that cannot be."""
    compiler = _compiler()
    targets = _targets(compiler)

    def make(library: Path, log: Path) -> None:
        _LOG.warning("Compiling the CPU operators with %s, once: a minute or two.", compiler)
        _compile(compiler, targets, library, log)

    return folders.made(f"native/{_key(compiler, targets)}", "operators.so", make)


def instruction_set(library: Path) -> str:
    """The instruction set that the compiled operators use on this processor."""
    ask = ctypes.CDLL(str(library)).kvpress_instruction_set
    ask.restype = ctypes.c_char_p
    return str(ask().decode())


def run(command: list[str], log: Path, what: str) -> str:
    """What a compiler said. Raises BackendError: one line that names the file with all of it.

    log: the file to whose end the command and its output are written where it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BackendError(f"{what} failed: {command[0]} cannot be run: {error}") from error
    said = done.stdout + done.stderr
    if done.returncode:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{shlex.join(command)}\n{said}\nexit status {done.returncode}\n\n")
        raise BackendError(f"{what} with {command[0]} failed. What it said is in {log}.")
    return said


def sources() -> Path:
    """The folder of the C++ sources."""
    (folder,) = __import__("kvpress.csrc", fromlist=["__path__"]).__path__
    return Path(folder)


def _compiler() -> str:
    if versions.numbers(torch.__version__) < _TORCH:
        raise BackendError(
            f"torch {torch.__version__} is older than {'.'.join(map(str, _TORCH))}, which the CPU"
            " operators need. Upgrade torch."
        )
    chosen = os.environ.get("CXX")
    for name in [chosen] if chosen else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    raise BackendError(
        f"No C++ compiler was found ({chosen or 'c++, g++, clang++'}). Install one, for example"
        " with your system's package g++, or set CXX."
    )


def _targets(compiler: str) -> dict[str, tuple[str, ...]]:
    """Instruction set -> flags: what this processor has and the compiler offers.

    The fastest is chosen at run time; beside it the portable one is for comparison only.
    """
    targets = dict(_X86) if platform.machine().lower() in ("x86_64", "amd64") else {}
    usable = {name: flags for name, flags in targets.items() if _has(flags)}
    offered = {name: flags for name, flags in usable.items() if _accepts(compiler, flags)}
    return {**offered, "portable": ("-O1",) if offered else ()}


def _has(flags: tuple[str, ...]) -> bool:
    """Whether this processor has what these flags ask for; where that is not known it may."""
    known = _cpu_line("flags").split()
    return not known or all(flag.removeprefix("-m") in known for flag in flags)


def _accepts(compiler: str, flags: tuple[str, ...]) -> bool:
    command = [compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _key(compiler: str, targets: dict[str, tuple[str, ...]]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [compiler.encode(), version, repr((targets, _COMMON)).encode()]
    parts += [torch.__version__.encode(), platform.machine().encode(), _cpu_features().encode()]
    for path in sorted(p for p in sources().rglob("*") if p.suffix in (".h", ".cpp")):
        parts += [path.relative_to(sources()).as_posix().encode(), path.read_bytes()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def processor() -> str:
    """The name of the processor, as the system knows it."""
    line = _cpu_line("model name")
    return line.partition(":")[2].strip() or platform.processor() or platform.machine()


def _cpu_features() -> str:
    return _cpu_line("flags", "Features") or platform.processor()


def _cpu_line(*starts: str) -> str:
    """The first line of Linux's description of the processor that starts so; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(starts)), "")


def _compile(compiler: str, targets: dict[str, tuple[str, ...]], library: Path, log: Path) -> None:
    """Compiles one kernel file per instruction set and the binding, and links."""
    torch_folder = Path(torch.__file__).parent
    binding = [f"-I{torch_folder / 'include'}", "-DTORCH_TARGET_VERSION=0x020A000000000000"]
    binding += [f"-DKERNELS_FOR_{name.upper()}" for name in targets]
    jobs = {"binding": ("binding.cpp", [*binding, "-O1"])}
    for name, flags in targets.items():
        jobs[name] = ("kernels.cpp", [f"-DKERNEL_ISA={name}", *flags])
    objects = [str(library.with_name(f"{name}.o")) for name in jobs]
    commands = [
        [compiler, *_COMMON, *flags, "-c", str(sources() / source), "-o", target]
        for (source, flags), target in zip(jobs.values(), objects, strict=True)
    ]
    what = "Compiling the CPU operators"
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda command: run(command, log, what), commands))
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    run([compiler, "-shared", *objects, *libraries, "-o", str(library)], log, what)
