"""Facts that a context states and asks for again: none has a template or a word of the evaluations.

They are there so that attention far back is seen: prose alone hardly asks for it.
"""

from __future__ import annotations

import random
from typing import NamedTuple

_MATERIALS = [
    *("copper", "linen", "walnut", "basalt", "amber", "cotton", "maple", "pewter", "slate"),
    *("velvet", "granite", "cedar", "bronze", "silk", "marble", "birch", "nickel", "wool"),
]
_TOOLS = [
    *("valve", "basket", "hinge", "bracket", "kettle", "shutter", "pulley", "gasket", "funnel"),
    *("ladder", "pump", "crate", "spool", "wrench", "barrel", "hammer", "cable", "bucket"),
]
_PLACES = ["north yard", "south dock", "annex", "east gate", "upper hall", "west depot", "cellar"]


class Fact(NamedTuple):
    """What is stated, how it is asked for, and what is then said again."""

    statement: str
    question: str
    answer: str


def fact(generator: random.Random) -> Fact:
    """One of five kinds: sentences with a number or a place, codes, assignments, pairs."""
    pick, kind = generator.choice, generator.randrange(5)
    thing = f"{pick(_MATERIALS)} {pick(_TOOLS)}"
    number = str(generator.randrange(10**3, 10 ** generator.randrange(4, 7)))
    first, second = (f"{generator.getrandbits(32):08x}" for _ in range(2))
    if kind == 0:
        told = f"The stock number of the {thing} is {number}."
        return Fact(f"\n{told}\n", f"Which stock number does the {thing} have?", told)
    if kind == 1:
        told = f"order {first}: {number}"
        return Fact(f"\n{told}\n", f"What was written for order {first}?", told)
    if kind == 2:
        name = thing.replace(" ", "_")
        return Fact(f"\n{name} = {number}\n", f"What is {name}?", f"{name} = {number}")
    if kind == 3:
        told = f"The {thing} is kept in the {pick(_PLACES)}"
        beside = f"{pick(_MATERIALS)} {pick(_TOOLS)}"
        return Fact(f"\n{told}, behind the {beside}.\n", f"Where is the {thing} kept?", told)
    told = f'"{first}": "{second}"'
    return Fact(f"\n{{{told}}}\n", f'What is the entry of "{first}"?', told)
