"""What the processes that hold one model agree on, so that they generate the same.

Each runs `generate()` by itself. Random numbers are those of process 0, and it alone says whether
the caller's own criteria, or a clock, stop: what one process does not do, others would wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList

from kvpress import host
from kvpress.errors import InputError
from kvpress.parallel import Ranks


class Agreed(StoppingCriteria):
    """A criterion that every process asks, and of which all believe process 0."""

    def __init__(self, criterion: Any, ranks: Ranks) -> None:
        self._criterion, self._ranks = criterion, ranks

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """What the criterion says in process 0: bool `[B]`."""
        said = self._criterion(input_ids, scores, **kwargs)
        done = said if isinstance(said, Tensor) else host.tensor([bool(said)])
        flags = done.to(input_ids.device, torch.uint8).expand(len(input_ids)).contiguous()
        return self._ranks.from_first(flags).bool()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_criterion"], name)


def agreed(ranks: Ranks, given: dict[str, Any], ids: Any, seconds: float | None) -> dict[str, Any]:
    """The arguments of a call as all processes have them.

    seconds: `max_time`, which then is a criterion as others. Raises InputError in all of them where
    they were given different ids.
    """
    _check_ids(ranks, ids)
    _share_random_numbers(ranks, ids)
    given, criteria = dict(given), list(given.get("stopping_criteria") or [])
    if seconds is not None:
        given["max_time"] = None
        criteria.append(MaxTimeCriteria(max_time=seconds))
    if criteria:
        given["stopping_criteria"] = StoppingCriteriaList(_agreed(ranks, criteria))
    return given


def _agreed(ranks: Ranks, criteria: Sequence[Any]) -> list[Any]:
    """Criteria that may differ, agreed on; those of transformers see the same tokens everywhere."""
    return [c if _follows(c) else Agreed(c, ranks) for c in criteria]


def _follows(criterion: Any) -> bool:
    stock = type(criterion).__module__.startswith("transformers.")
    return stock and not isinstance(criterion, MaxTimeCriteria)


def _check_ids(ranks: Ranks, ids: Any) -> None:
    own = None
    if isinstance(ids, Tensor):
        plain = ids.detach().cpu().contiguous()
        own = (tuple(plain.shape), xxhash.xxh3_64_intdigest(plain.numpy().tobytes()))
    shapes = ranks.objects(own)
    if any(other != shapes[0] for other in shapes):
        sizes = ["no ids" if x is None else f"ids of shape {list(x[0])}" for x in shapes]
        raise InputError(
            f"{ranks.size} processes hold this model together, but were given different ids:"
            f" {'; '.join(sizes)}. Give all of them the same text; others go into another call."
        )


def _share_random_numbers(ranks: Ranks, ids: Any) -> None:
    """All draw what process 0 would draw."""
    torch.set_rng_state(ranks.from_first(torch.get_rng_state()))
    device = ids.device if isinstance(ids, Tensor) else None
    if device is not None and device.type == "cuda":
        state = ranks.from_first(torch.cuda.get_rng_state(device))
        torch.cuda.set_rng_state(state, device)
