"""How a batcher is just now."""

from __future__ import annotations

import time

from kvpress.batching.loop import Loop
from kvpress.batching.stats import Stats
from kvpress.batching.stepper import Stepper


def moment(stepper: Stepper, loop: Loop) -> Stats:
    """The figures of a batcher; any thread may ask."""
    counts, reserving = stepper.counts, stepper.reserving
    running = list(stepper.running)
    return Stats(
        running=len(running),
        waiting=loop.arriving + len(stepper.order) + len(stepper.admission.aside),
        submitted=counts.submitted,
        finished=counts.finished,
        cancelled=counts.cancelled,
        failed=counts.failed,
        refused=counts.refused,
        preempted=counts.preempted,
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        generated_tokens=counts.generated_tokens,
        bytes_held=counts.bytes_held,
        bytes_promised=reserving.promised,
        bytes_capacity=reserving.cap,
        bytes_full=sum(reserving.full(len(text.ids)) for text in running),
        bytes_prefixes=stepper.prefixes.nbytes,
        bytes_host=stepper.parking.bytes_host,
        bytes_disk=stepper.parking.bytes_disk,
        steps=counts.steps,
        step_seconds=counts.step_seconds,
        last_step_at=counts.last_step_at if loop.is_busy else time.monotonic(),
        tokens_per_second=counts.tokens_per_second,
        waiting_tokens=stepper.order.tokens,
        alive=loop.alive,
    )
