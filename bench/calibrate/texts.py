"""What a model is calibrated on: prose, source code and records, each text of another kind.

Kinds matter more than amounts. None of them shares a sentence or a template with the evaluations.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpress.bench.common.text import Text, TextError, read_text

LEAST = 256  # tokens of a text from which shares are worth something
_MATERIALS = ["copper", "linen", "walnut", "basalt", "amber", "cotton", "maple", "pewter", "slate"]
_THINGS = ["valve", "basket", "hinge", "bracket", "kettle", "shutter", "pulley", "gasket", "funnel"]
_PLACES = ["north", "south", "dock", "annex", "yard"]


def texts(given: Sequence[Path] | None, seed: int) -> list[Text]:
    """The texts that were given, or those that ship and records made with the seed."""
    if given:
        return [read_text(path) for path in given]
    folder = Path(__file__).with_name("texts")
    shipped = [read_text(folder / f"{kind}.txt") for kind in ("prose", "code")]
    return [*shipped, Text(f"records-{seed}", records(seed))]


def records(seed: int, lines: int = 60) -> str:
    """JSON, lines of a log, and assignments: numbers and names that nothing predicts."""
    generator = random.Random(seed)
    return "".join(f"{_record(generator)}\n" for _ in range(lines))


def _record(generator: random.Random) -> str:
    pick, number = generator.choice, generator.randrange
    form = number(3)
    if form == 0:
        name, price = f"{pick(_MATERIALS)} {pick(_THINGS)}", number(100, 9999) / 100
        return (
            f'{{"id": {number(10**5, 10**6)}, "item": "{name}", "price": {price},'
            f' "stock": {number(500)}, "store": "{pick(_PLACES)}"}}'
        )
    if form == 1:
        day = f"2019-{number(1, 13):02d}-{number(1, 29):02d} {number(24):02d}:{number(60):02d}"
        order = f"order {generator.getrandbits(32):08x} of {number(1, 40)} {pick(_THINGS)}s"
        return f"{day} {order} shipped to the {pick(_PLACES)} gate"
    return f"{pick(_MATERIALS)}_{pick(_THINGS)} = {number(10**3, 10**6)}"


def ids(model: Any, tokenizer: Any, text: Text, tokens: int) -> Any:
    """The first tokens of a text: int64 `[1, T]`, on the model's device.

    With the tokens that the tokenizer begins every text with. Raises TextError for a short one.
    """
    import torch

    found = [
        *tokenizer("")["input_ids"],
        *tokenizer(text.content, add_special_tokens=False)["input_ids"],
    ][:tokens]
    if len(found) < min(LEAST, tokens):
        raise TextError(
            f"{text.name} has {len(found)} tokens; a calibration needs {min(LEAST, tokens)}. Give a"
            " longer text."
        )
    return torch.tensor([found], device=model.device)
