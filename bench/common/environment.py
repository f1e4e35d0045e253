"""Where something is measured: device, processor, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import kvpress
from kvpress import ops
from kvpress.ops import build_cpu, versions

_VARIABLES = ("KVPRESS_BACKEND", "KVPRESS_CPU", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads, versions, commit, backends, variables of this process."""
    on_gpu = device.type == "cuda"
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "cpu": build_cpu.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": {
            "kvpress": kvpress.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: versions.installed(name) for name in ("torch", "triton", "transformers")},
        },
        "commit": _commit(),
        "backends": dict(ops.backends()),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def machine(facts: Mapping[str, Any]) -> str:
    """What decides times, of an environment: the GPU, or the processor where there is none."""
    return str(facts["device"] if facts["device"] != "cpu" else facts["cpu"])


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+` where files changed."""
    folder = Path(kvpress.__file__).parents[1]
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
