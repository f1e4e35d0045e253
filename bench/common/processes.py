"""Measurements in processes of their own, so that nothing that others left behind counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from kvpress.bench.common.journal import Row

# Blocks that are freed must go back to the system at once, or they would count as resident.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


def in_a_process(module: str, job: dict[str, Any], frees: bool = True) -> Row:
    """What a module makes of a job, which it reads as JSON from standard input.

    frees: whether freed blocks go back to the system at once; otherwise the allocator keeps what it
    keeps of a user's own. The row is the last line of standard output; one with an error where the
    process fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, **(_MALLOC if frees else {})},
        check=False,
    )
    if done.returncode < 0:
        return {"error": f"the process was killed by signal {-done.returncode}: out of memory?"}
    if done.returncode > 0:
        return {"error": done.stderr.strip().rpartition("\n")[2] or "the process failed"}
    row: Row = json.loads(done.stdout.rpartition("\n")[2])
    return row
