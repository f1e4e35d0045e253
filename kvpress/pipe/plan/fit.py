"""Whether a policy fits, with the largest chunks and the largest budget that do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from kvpress.errors import KVPressError
from kvpress.pipe.plan.demand import Shape, Texts
from kvpress.pipe.plan.held import cache_bytes
from kvpress.pipe.plan.looking import Looking, asks
from kvpress.pipe.plan.passing import passing_bytes
from kvpress.pipe.plan.plan import Fit, Memory
from kvpress.pipe.plan.room import device_bytes, floor, lower_bytes
from kvpress.policy.ladder import Rung
from kvpress.policy.loading import parse
from kvpress.policy.recipe import Recipe

CHUNKS = (8192, 4096, 2048, 1024, 512, 256, 128)  # tokens of a prompt that are read at once
LEAST = 128  # tokens of a budget, below which nothing is proposed
_STEP = 16  # tokens between budgets


class Asked(NamedTuple):
    """What is asked of every policy.

    admits: why one is none for this model, "" where it is. head: of one that asks for a head; None:
    nobody has looked at one.
    """

    shape: Shape
    texts: Texts
    memory: Memory
    admits: Callable[[Recipe, bool], str] = lambda recipe, tiered: ""
    head: Callable[[Recipe], Looking | None] = lambda recipe: None


def fit(asked: Asked, rung: Rung) -> Fit:
    """The rung with the most that fits; where nothing does, with the least that would have to."""
    tokens = LEAST if rung.searches else 0
    first = Fit(rung.kind, rung.spec, rung.tiered)
    try:
        recipe = parse(rung.at(tokens))
    except KVPressError as error:
        return replace(first, refused=str(error))
    if rung.tiered and not asked.memory.host + asked.memory.disk:
        return replace(first, refused="there is neither host= nor disk=")
    refused = asked.admits(recipe, rung.tiered) or (_lacks(asked, recipe) if rung.tiered else "")
    if refused:
        return replace(first, refused=refused)
    least = [_sized(asked, rung, tokens, chunk) for chunk in _chunks(asked.texts)]
    if not rung.searches:
        return next((one for one in least if one.fits), least[-1])
    if not least[-1].fits:
        return least[-1]
    # Reading gets at most half of what is left: the larger a chunk, the more a policy sees of a
    # prompt before it evicts, but what it takes is lost to the budget.
    free = asked.memory.given - asked.memory.base
    large = [one for one in least if one.fits and one.passing <= free // 2]
    return _largest(asked, rung, (large or least[-1:])[0].chunk)


def _lacks(asked: Asked, recipe: Recipe) -> str:
    """Why nothing of this model can go to the tiers that there are; "" where it can."""
    shape, memory = asked.shape, asked.memory
    if not shape.tiered:
        return "all layers keep their window on the device"
    return floor(recipe, shape.tiered, shape.stored).lacks(memory.host, memory.disk)


def _chunks(texts: Texts) -> list[int]:
    """The whole prompt, and parts of it, in descending order."""
    return [texts.prompt, *(chunk for chunk in CHUNKS if chunk < texts.prompt)]


def _largest(asked: Asked, rung: Rung, chunk: int) -> Fit:
    """With the largest budget that fits, of at least LEAST tokens, which do."""
    low, high = LEAST // _STEP, max(LEAST, asked.texts.length) // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        fits = _sized(asked, rung, middle * _STEP, chunk).fits
        low, high = (middle, high) if fits else (low, middle - 1)
    return _sized(asked, rung, low * _STEP, chunk)


def _sized(asked: Asked, rung: Rung, tokens: int, chunk: int) -> Fit:
    """With a budget and chunks."""
    spec, memory = rung.at(tokens), asked.memory
    recipe, texts = parse(spec), asked.texts
    held = cache_bytes(asked.shape, recipe, texts, chunk, rung.tiered)
    stored = _stored(recipe, texts, chunk)
    head = (asked.head(recipe) or Looking.like(asked.shape)) if asks(recipe, asked.shape) else None
    passing = passing_bytes(asked.shape, recipe, texts, chunk, stored, rung.tiered, head)
    looking = 0 if head is None else head.held(texts)
    made = Fit(rung.kind, spec, rung.tiered, 0, chunk, held, looking, passing)
    if not rung.tiered:
        needed = memory.base + passing + held.held + held.waiting + looking
        return replace(made, needed=needed, fits=needed <= memory.given)
    return _in_tiers(asked, made, recipe)


def _in_tiers(asked: Asked, made: Fit, recipe: Recipe) -> Fit:
    """The same, where pages go down: the device has what the lower tiers leave, and more."""
    memory = asked.memory
    below = lower_bytes(memory)
    fixed = memory.base + made.passing + made.head + below.beside
    least = device_bytes(asked.shape, recipe, asked.texts.batch, made.bytes, below.pages)
    needed = fixed + least
    if needed > memory.given:
        return replace(made, needed=needed, device=least)
    return replace(made, needed=memory.given, device=memory.given - fixed, fits=True)


def _stored(recipe: Recipe, texts: Texts, chunk: int) -> int:
    """Slots of a row that a chunk of a prompt finds at the most."""
    before = texts.prompt - chunk
    limits = recipe.limits
    if limits is None or recipe.defers or recipe.shares or limits.budget.unit == "bytes":
        return before
    amount = limits.budget.amount
    kept = int(amount * texts.prompt) if limits.budget.relative else int(amount)
    most = 1 if not recipe.uneven else 3  # a row may have more than others
    return min(before, most * (kept + limits.least))
