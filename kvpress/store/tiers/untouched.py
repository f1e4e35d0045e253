"""What nobody uses of a CPU's memory goes back to the system; used again, it is zero."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

from torch import Tensor

_DONTNEED = 4  # MADV_DONTNEED: what is there is lost, its memory is free at once
_LEAST = 1 << 17  # bytes: a span of a prompt, not the pages that steps take and give


def untouch(memory_X: Tensor, begin: int, end: int) -> None:
    """Gives back the whole pages of the system among these bytes, where that is worth a call."""
    if end - begin < _LEAST or memory_X.device.type != "cpu" or _LIBC is None:
        return
    size, start = mmap.PAGESIZE, memory_X.data_ptr()
    first, last = -(-(start + begin) // size) * size, (start + end) // size * size
    if first < last:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)


def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


_LIBC = _libc()
