"""The host tier's memory, one arena that never grows, and copies between it and a device.

The arena is anonymous memory that begins at a page, which direct I/O asks for; a tensor of torch
need not. It is pinned where a device of CUDA is. Copies go through a `CopyEngine`, so that tests
can delay them and finish them in another order, and races show without a GPU.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kvpress import ops
from kvpress.errors import TierError
from kvpress.host import lasting


class Copying(Protocol):
    """A copy that is under way."""

    def wait(self) -> None:
        """Returns when the bytes are there."""


class CopyEngine(Protocol):
    """Copies between the host and a device."""

    def pin(self, arena_X: Tensor) -> None:
        """Called once with the arena, before anything is copied."""

    def unpin(self, arena_X: Tensor) -> None:
        """Called before the arena goes."""

    def fence(self, device: torch.device) -> Any:
        """What a device was given to do so far by the thread that asks."""

    def after(self, fence: Any) -> None:
        """Lets later copies begin only once that is done: they may go where it still reads."""

    def copy(self, target: Tensor, source: Tensor) -> Copying:
        """Begins to copy. Both stay as they are until `wait` has returned."""

    def gather(
        self, target_PX: Tensor, to: Sequence[int], source_X: Tensor, begins: Sequence[int]
    ) -> Copying:
        """Begins to copy the bytes at `begins` to some rows of as many bytes."""


class Copied:
    """A copy that has ended."""

    def wait(self) -> None:
        return


class PlainCopies:
    """Copies that have ended when `copy` returns."""

    def pin(self, arena_X: Tensor) -> None:
        return

    def unpin(self, arena_X: Tensor) -> None:
        return

    def fence(self, device: torch.device) -> None:
        return

    def after(self, fence: Any) -> None:
        return

    def copy(self, target: Tensor, source: Tensor) -> Copied:
        if target.is_cuda or source.is_cuda:
            target.copy_(source)
        else:  # by one thread, without the interpreter lock: those of torch are at work elsewhere
            np.copyto(target.numpy(), source.numpy())
        return Copied()

    def gather(
        self, target_PX: Tensor, to: Sequence[int], source_X: Tensor, begins: Sequence[int]
    ) -> Copied:
        # By this thread alone: another gains little, and takes from those that compute.
        ops.copy_ranges(target_PX, _numbers(to), source_X, _numbers(begins))
        return Copied()


def _numbers(x: Sequence[int]) -> Tensor:
    # Of a list torch.tensor takes six times as long.
    return torch.from_numpy(np.array(x, dtype=np.int64))


class StreamCopies:
    """Copies on a stream of their own, from and to pinned memory. Not run yet: needs a GPU."""

    def __init__(self) -> None:
        self._stream: Any = None  # of the device that was seen first

    def pin(self, arena_X: Tensor) -> None:
        failed = _runtime().cudaHostRegister(arena_X.data_ptr(), arena_X.numel(), 0)
        if int(failed):
            raise TierError(
                f"{arena_X.numel()} bytes of host memory could not be pinned (CUDA error"
                f" {int(failed)}). Lower the host tier, or raise the limit of locked memory."
            )

    def unpin(self, arena_X: Tensor) -> None:
        _runtime().cudaHostUnregister(arena_X.data_ptr())

    def fence(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        self._start(device)
        return event

    def after(self, fence: Any) -> None:
        if fence is not None:
            self._stream.wait_event(fence)

    def _start(self, device: torch.device) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, source: Tensor) -> Copying:
        devices = [x.device for x in (target, source) if x.is_cuda]
        if not devices:
            return PlainCopies().copy(target, source)
        with self._streaming(devices[0]) as event:
            target.copy_(source.contiguous(), non_blocking=True)
        for tensor in (target, source):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)
        return _Recorded(event)

    def gather(
        self, target_PX: Tensor, to: Sequence[int], source_X: Tensor, begins: Sequence[int]
    ) -> Copying:
        if not target_PX.is_cuda:
            return PlainCopies().gather(target_PX, to, source_X, begins)
        width = target_PX.shape[1]
        with self._streaming(target_PX.device) as event:
            for row, begin in zip(to, begins, strict=True):
                target_PX[row].copy_(source_X[begin : begin + width], non_blocking=True)
        target_PX.record_stream(self._stream)
        return _Recorded(event)

    @contextmanager
    def _streaming(self, device: torch.device) -> Iterator[Any]:
        """Work of the stream, and the event of its end."""
        self._start(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            yield event
            event.record(self._stream)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class _Recorded:
    """A copy that has ended when its event has."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def copies() -> CopyEngine:
    """The copies of this machine."""
    return StreamCopies() if torch.cuda.is_available() else PlainCopies()


class Arena:
    """`size` bytes: as a tensor, and as a buffer that the operating system reads into.

    They stay as long as a tensor into them does.
    """

    @lasting
    def __init__(self, size: int) -> None:
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=flags)
        except (OSError, OverflowError) as error:
            raise TierError(
                f"{size} bytes of host memory cannot be had ({error}). Lower the host tier."
            ) from error
        with suppress(OSError, AttributeError):  # fewer pieces for direct I/O: a third of its cost
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = memoryview(memory)
        self.tensor_X = torch.frombuffer(memory, dtype=torch.uint8)

    def rows(self, begins: Sequence[int], width: int) -> Tensor:
        """The bytes at `begins`, `width` each: uint8 `[A, width]`.

        A view where the begins are evenly spaced, as they are for all slices of a record; a copy
        otherwise.
        """
        step = begins[1] - begins[0] if len(begins) > 1 else width
        steps = () if isinstance(begins, range) else itertools.pairwise(begins)
        if step >= 0 and all(b - a == step for a, b in steps):
            return self.tensor_X.as_strided((len(begins), width), (step, 1), begins[0])
        return torch.stack([self.tensor_X[begin : begin + width] for begin in begins])
