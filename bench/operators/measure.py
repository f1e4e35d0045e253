"""Cases are checked, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from kvpress.bench.common import progress
from kvpress.bench.common.timing import interleave
from kvpress.bench.operators.registry import Case, Outcome


def time_cases(
    cases: Sequence[Case], device: torch.device, rounds: int, warmup: int
) -> list[Outcome]:
    """The outcome of every case."""
    outcomes = []
    with progress.bar() as shown:
        task = progress.start(shown, len(cases) * (rounds + warmup))
        for number, case in enumerate(cases):
            shown.update(task, description=case.title)
            outcomes.append(measure(case, device, rounds, warmup, lambda _: shown.advance(task)))
            # A case that was refused ran no round.
            shown.update(task, completed=(number + 1) * (rounds + warmup))
    return outcomes


@torch.inference_mode()
def measure(
    case: Case,
    device: torch.device,
    rounds: int,
    warmup: int,
    on_round: Callable[[int], None] | None = None,
) -> Outcome:
    """Checks the case, then times its candidates; a case whose check is red is not timed."""
    try:
        refused = case.check(device)
    except Exception as error:  # whatever keeps it from passing its check keeps it from being timed
        refused = f"{type(error).__name__}: {error}"
    if refused is not None:
        return Outcome(case, {}, refused)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else None
    samples = interleave(case.prepare(device), rounds, warmup, on_round, synchronize)
    return Outcome(case, samples)
