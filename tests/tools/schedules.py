"""Random schedules of requests on a tiny model, and what each of them must come to."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import helpers
import torch

from kvpress.batching.handle import Handle
from kvpress.batching.making import Made, make
from kvpress.batching.request import Request
from kvpress.batching.stepper import Pace
from kvpress.store.tiers.caps import Caps

CHUNK = 48


@dataclass
class Planned:
    """A request, at which step it comes, and at which step its caller leaves; None: it stays."""

    request: Request
    comes: int
    leaves: int | None = None
    handle: Handle | None = None


def model(family: str = "llama", **fields: Any) -> Any:
    """A tiny model that never ends by itself."""
    made = helpers.sharp(family, **fields)
    made.generation_config.eos_token_id = None
    return made


def schedule(seed: int, requests: int = 8, most: int = 150) -> list[Planned]:
    """Requests with prompts of 3 to `most` tokens; some begin alike, and two leave early."""
    draw = random.Random(seed)
    common = [draw.randrange(3, helpers.VOCAB) for _ in range(2 * CHUNK + 5)]
    made = []
    for number in range(requests):
        ids = [draw.randrange(3, helpers.VOCAB) for _ in range(draw.randrange(3, most))]
        ids = common + ids[:20] if number % 3 == 1 else ids
        request = Request(tuple(ids), draw.randrange(1, 24))
        made.append(Planned(request, draw.randrange(0, 12)))
    for leaver in draw.sample(made, 2):
        leaver.leaves = leaver.comes + draw.randrange(1, 6)
    return sorted(made, key=lambda planned: planned.comes)


def alone(engine: Any, request: Request, chunk: int = CHUNK) -> tuple[list[int], list[list[int]]]:
    """Tokens and kept positions of a request that `generate()` serves, with the same chunks."""
    ids = torch.tensor([request.ids])
    cache = engine.new_cache()
    sampling = request.sampling
    options: dict[str, Any] = {"do_sample": False}
    names = ("temperature", "top_p", "top_k")
    given = {n: x for n in names if (x := getattr(sampling, n)) is not None}
    if given:
        torch.manual_seed(sampling.seed or 0)
        options = {"do_sample": True, **given}
    out = engine.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=cache,
        max_new_tokens=request.max_new_tokens,
        prefill_chunk_size=chunk,
        eos_token_id=list(request.ends) or None,
        pad_token_id=0,
        **options,
    )
    return out[0, ids.shape[1] :].tolist(), positions(cache)


def positions(cache: Any) -> list[list[int]]:
    """The positions that every row of a cache of one text holds."""
    rows = [(state.kind.index, head) for state in cache.states for head in range(state.kind.heads)]
    return [cache.kept_positions(index, 0, head) for index, head in rows]


def made(engine: Any, pace: Pace | None = None, caps: Caps | int | None = None) -> Made:
    """What a batcher is made of, without its thread."""
    caps = Caps(caps) if isinstance(caps, int) else caps
    return make(engine, pace or Pace(chunk=CHUNK, step_tokens=2 * CHUNK), caps)


def run(own: Made, planned: list[Planned], check: Any = None, steps: int = 400) -> None:
    """Steps through a schedule to its end. check: called after every step."""
    stepper = own.stepper
    for step in range(steps):
        for number, one in enumerate(planned):
            if one.comes == step:
                one.handle = own.desk.handle(number, one.request, lambda: None)
                stepper.order.add(one.handle)
            if one.leaves == step and one.handle is not None:
                one.handle.cancel()
        stepper.step()
        if check is not None:
            check(stepper)
        left = stepper.running or stepper.admission.aside or len(stepper.order)
        if step > 20 and not left:
            return
    raise AssertionError("the schedule does not come to an end")
