"""Processes that hold a model together: which one this is, and what they tell each other.

Each has some of the KV heads of every layer. What rows decide by themselves costs nothing here;
where rows of one layer decide together, their scores are gathered, and each process comes to the
same answer. A process alone gathers nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.functional import pad

from kvpress import host
from kvpress.errors import AttachError

TIMEOUT = "KVPRESS_TIMEOUT"  # the environment variable: seconds until a silent process is given up
SECONDS = 120.0  # of silence, where nobody said otherwise; transformers waits for two hours


def timeout(given: float | None = None) -> float:
    """Seconds until a silent process is given up: what was given, the variable, or 120.

    Raises AttachError for what is no positive number.
    """
    said: Any = os.environ.get(TIMEOUT) or SECONDS if given is None else given
    try:
        seconds = float(said)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < 1e7:
        where = TIMEOUT if given is None else "timeout"
        raise AttachError(
            f"{where}={said!r} is no time to wait for a process that says nothing. Give seconds, as"
            f" in {where}=120."
        )
    return seconds


@dataclass(frozen=True)
class Ranks:
    """The processes that hold one model together.

    rank: which of `size` this is. group: of torch.distributed. device: where what is gathered must
    be; None: where it is.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    device: torch.device | None = None

    def __deepcopy__(self, memo: object) -> Ranks:
        return self

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"

    @property
    def alone(self) -> bool:
        """Whether there is nobody to tell anything."""
        return self.size == 1

    def gather(self, part: Tensor, dim: int = 1, fill: float = 0.0) -> Tensor:
        """The parts of all processes one behind the other along `dim`, as each of them gets it.

        Their last dimension may differ: a narrower part is filled up. All others are the same.
        """
        if self.alone:
            return part
        width = max(self._gathered(host.tensor([part.shape[-1]])).tolist())
        wide = pad(part, (0, width - part.shape[-1]), value=fill)
        flags = wide.dtype == torch.bool
        parts = self._gathered((wide.to(torch.uint8) if flags else wide)[None]).to(part.device)
        whole = torch.cat(parts.unbind(0), dim=dim)
        return whole.bool() if flags else whole

    def any(self, found: bool) -> bool:
        """Whether something was found in any process."""
        return found if self.alone else bool(self._gathered(host.tensor([int(found)])).any())

    def most(self, count: int) -> int:
        """The largest of what processes counted."""
        return count if self.alone else int(self._gathered(host.tensor([count])).max())

    def from_first(self, own: Tensor) -> Tensor:
        """What process 0 has; all others have a tensor of the same shape."""
        if self.alone:
            return own
        sent = own.detach().clone().to(self.device or own.device)
        dist.broadcast(sent, group_src=0, group=self.group)
        return sent.to(own.device)

    def objects(self, own: Any) -> list[Any]:
        """What every process has: plain values, in the order of their ranks."""
        if self.alone:
            return [own]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, own, group=self.group)
        return every

    def _gathered(self, part: Tensor) -> Tensor:
        """The parts of all processes, one behind the other along the first dimension."""
        sent = part.detach().contiguous().to(self.device or part.device)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts)


ALONE = Ranks()


def joined(group: Any, device: torch.device, seconds: float) -> Ranks:
    """The processes of a group, which from now on wait so many seconds for each other at most."""
    limit = timedelta(seconds=seconds)
    for known in {id(x): x for x in (group, dist.group.WORLD)}.values():
        dist.distributed_c10d._set_pg_timeout(limit, known)
    return Ranks(dist.get_rank(group), dist.get_world_size(group), group, device)


def started() -> Ranks:
    """The processes that were joined, before there is a model; this one alone where none was."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


def start(device: str, given: float | None = None) -> None:
    """Joins the processes that torchrun started, if it did, before transformers would.

    Raises AttachError where there is only this one.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise AttachError(
            "A model can be divided among processes that torchrun starts, but this one was started"
            " alone. Run torchrun --nproc-per-node N -m kvpress ..., with as many as --tp says."
        )
    seconds = timedelta(seconds=timeout(given))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=seconds)
