"""`read_records` under a system that fails: tests/tools/faulty.py in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvpress import ops

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="no C++ compiler here")
def test_a_faulty_system_gives_the_bytes_or_a_status(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs Linux, and g++ or clang++")
    library = tmp_path / "faults.so"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-O1", str(TOOLS / "faults.cpp")]
    subprocess.run([*command, "-o", str(library), "-ldl"], check=True)
    loaded = " ".join(filter(None, (os.environ.get("LD_PRELOAD"), str(library))))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TOOLS / "faulty.py")],
        env={**os.environ, "LD_PRELOAD": loaded},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
