"""Peak bytes: resident ones of this process, or those that torch allocated on a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from kvpress.errors import KVPressError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)


class PeakError(KVPressError, RuntimeError):
    """A system that does not tell how many bytes are resident at most."""


class Peak:
    """The most bytes since the last `reset`. Raises PeakError where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type != "cuda" and not _CLEAR.exists():
            raise PeakError(
                "Peak resident bytes are read from /proc/self, which this system lacks. Measure"
                " memory on Linux or on a GPU."
            )
        self.reset()

    def reset(self) -> None:
        """Forgets the peak so far: what is held now counts."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _CLEAR.write_text(_RESET_PEAK)

    def bytes(self) -> int:
        """The most bytes since the last reset."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident("VmHWM")

    def now(self) -> int:
        """The bytes at this moment."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _resident("VmRSS")


def _resident(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise PeakError(f"{_STATUS} has no entry {name}. Measure memory on Linux or on a GPU.")
