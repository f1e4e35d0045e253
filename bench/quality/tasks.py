"""The tasks: each makes a sample of about so many tokens from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from kvpress.bench.quality import instructions
from kvpress.bench.quality.sample import Question, Sample, Writer

Metric = Literal["exact", "tokens", "lm_eval"]
LM_EVAL: Metric = "lm_eval"  # of tasks that lm-eval scores in its own ways
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

_THINGS = [
    "lighthouse",
    "orchard",
    "violin",
    "canyon",
    "harbour",
    "lantern",
    "meadow",
    "glacier",
    "compass",
    "saddle",
    "anchor",
    "museum",
    "thunder",
    "ribbon",
    "castle",
    "pepper",
]
_PEOPLE = [
    "Arno",
    "Beatrix",
    "Casimir",
    "Dorothea",
    "Emil",
    "Frida",
    "Gustav",
    "Henrike",
    "Ivo",
    "Jolanda",
    "Konrad",
    "Lieselotte",
]
_CITIES = [
    "Lisbon",
    "Oslo",
    "Prague",
    "Vienna",
    "Dublin",
    "Athens",
    "Madrid",
    "Warsaw",
    "Helsinki",
    "Budapest",
    "Zurich",
    "Naples",
]
_SURNAMES = [
    "Abendroth",
    "Brandis",
    "Castell",
    "Dormann",
    "Eichholz",
    "Falkner",
    "Gerber",
    "Hollweg",
    "Imhof",
    "Jansen",
    "Kessler",
    "Lindqvist",
]


@dataclass(frozen=True)
class Task:
    """How samples are made and scored.

    make: of a writer, a random generator, tokens and the number of the sample. metric: whether all
    tokens of an answer must be right, or the share of right ones counts. asks: whether there is a
    question that could be known while the context is compressed.
    """

    name: str
    summary: str
    make: Callable[[Writer, random.Random, int, int], Sample]
    metric: Metric = "exact"
    asks: bool = True


def _continuation(tokens: int) -> Callable[[Writer, random.Random, int, int], Sample]:
    def make(writer: Writer, generator: random.Random, length: int, index: int) -> Sample:
        passage = writer.passage(length + 1 + tokens, generator)
        question = Question((passage[length],), tuple(passage[length + 1 :]))
        return Sample((*writer.prefix, *passage[:length]), (question,))

    return make


def _copy(writer: Writer, generator: random.Random, length: int, index: int) -> Sample:
    """Cues of 16 tokens; what should follow is what followed them in the context."""
    cue, gold, passage = 16, 64, writer.passage(length, generator)
    questions = []
    for depth in (0.1, 0.37, 0.63, 0.9):
        start = int(depth * (length - cue - gold))
        middle, end = start + cue, start + cue + gold
        question = (*writer.ids("\n\n"), *passage[start:middle])
        questions.append(Question(question, tuple(passage[middle:end]), f"depth {depth:g}"))
    return Sample((*writer.prefix, *passage), tuple(questions))


def _needles(keys: int) -> Callable[[Writer, random.Random, int, int], Sample]:
    """Codes of things, spread over the context; a question about each."""

    def make(writer: Writer, generator: random.Random, length: int, index: int) -> Sample:
        things = generator.sample(_THINGS, keys)
        codes = [str(generator.randrange(10**4, 10**5)) for _ in things]
        texts = [
            writer.ids(f"\nThe secret code of the {thing} is {code}.\n")
            for thing, code in zip(things, codes, strict=True)
        ]
        if keys == 1:
            depths = [DEPTHS[index % len(DEPTHS)]]
        else:
            depths = [(i + generator.random()) / keys for i in range(keys)]
        passage = writer.passage(length - sum(map(len, texts)), generator)
        context = writer.insert(passage, list(zip(depths, texts, strict=True)))
        questions = (
            writer.question(
                f"\n\nQuestion: What is the secret code of the {thing}?\nAnswer: The secret code of"
                f" the {thing} is ",
                code,
                f"depth {depth:.2f}",
            )
            for thing, code, depth in zip(things, codes, depths, strict=True)
        )
        return Sample(
            (*writer.prefix, *context), tuple(questions), depths[0] if keys == 1 else None
        )

    return make


def _pairs(writer: Writer, generator: random.Random, length: int, index: int) -> Sample:
    """Nothing but keys and values, as JSON; four of them are asked for."""
    pairs: dict[str, str] = {}
    used = 0
    while used < length - 40:
        key, value = (f"{generator.getrandbits(32):08x}" for _ in range(2))
        used += len(writer.ids(f'"{key}": "{value}", '))
        pairs[key] = value
    text = "JSON data:\n" + json.dumps(pairs) + "\n"
    questions = (
        writer.question(f'\nKey: "{key}"\nThe value of this key is: "', pairs[key])
        for key in generator.sample(sorted(pairs), 4)
    )
    return Sample((*writer.prefix, *writer.ids(text)), tuple(questions))


def _variables(writer: Writer, generator: random.Random, length: int, index: int) -> Sample:
    """A chain of assignments; the value is asked of its start, and one and two steps later."""
    names = generator.sample([f"{a}{b}" for a in "KLMNPQRST" for b in "VWXYZ"], 3)
    value = str(generator.randrange(10**4, 10**5))
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    texts = [writer.ids(f"\n{line}\n") for line in lines]
    passage = writer.passage(length - sum(map(len, texts)), generator)
    depths = [(i + generator.random()) / 3 for i in range(3)]
    context = writer.insert(passage, list(zip(depths, texts, strict=True)))
    questions = (
        writer.question(
            f"\n\nQuestion: What is the value of VAR {name}?\nAnswer: VAR {name} = ", value, hops
        )
        for name, hops in zip(names, ("direct", "one step", "two steps"), strict=True)
    )
    return Sample((*writer.prefix, *context), tuple(questions))


def _facts(writer: Writer, generator: random.Random, length: int, index: int) -> Sample:
    """Where people live; a question about each of four."""
    people, cities = generator.sample(_PEOPLE, 4), generator.sample(_CITIES, 4)
    texts = [
        writer.ids(f"\n{person} is a teacher and lives in the city of {city}.\n")
        for person, city in zip(people, cities, strict=True)
    ]
    passage = writer.passage(length - sum(map(len, texts)), generator)
    depths = [(i + generator.random()) / 4 for i in range(4)]
    context = writer.insert(passage, list(zip(depths, texts, strict=True)))
    questions = (
        writer.question(
            f"\n\nQuestion: Where does {person} live?\nAnswer: {person} lives in the city of",
            f" {city}",
        )
        for person, city in zip(people, cities, strict=True)
    )
    return Sample((*writer.prefix, *context), tuple(questions))


def _records(writer: Writer, generator: random.Random, length: int, index: int) -> Sample:
    """Lines of invented people, one for about 160 tokens; two fields of four of them are asked."""
    count = max(4, length // 160)
    people = generator.sample([f"Dr. {a} {b}" for a in _PEOPLE for b in _SURNAMES], count)
    rows = [
        {
            "city": generator.choice(_CITIES),
            "badge": str(generator.randrange(10**4, 10**5)),
            "office": str(generator.randrange(100, 1000)),
        }
        for _ in people
    ]
    heads = [f"\nName: {person}" for person in people]
    texts = [
        writer.ids(head + "".join(f"; {name}: {value}" for name, value in row.items()) + "\n")
        for head, row in zip(heads, rows, strict=True)
    ]
    passage = writer.passage(length - sum(map(len, texts)), generator)
    depths = [(i + generator.random()) / count for i in range(count)]
    context = writer.insert(passage, list(zip(depths, texts, strict=True)))
    questions = []
    for place in generator.sample(range(count), 4):
        city, badge = rows[place]["city"], rows[place]["badge"]
        label = f"depth {depths[place]:.2f}"
        questions += [
            writer.question(f"\n{heads[place]}; city:", f" {city}", f"city, {label}"),
            writer.question(f"\n{heads[place]}; city: {city}; badge: ", badge, f"badge, {label}"),
        ]
    return Sample((*writer.prefix, *context), tuple(questions))


def _lines(writer: Writer, generator: random.Random, length: int, index: int) -> Sample:
    """Nothing but numbered lines with values, as LongEval's; four of them are asked for."""
    values: list[str] = []
    texts: list[list[int]] = []
    while sum(map(len, texts)) < length - 40:
        values.append(str(generator.randrange(10**4, 10**5)))
        texts.append(writer.ids(f"Line {len(values)}: the value is {values[-1]}.\n"))
    questions = (
        writer.question(f"\nLine {number + 1}: the value is ", values[number])
        for number in generator.sample(range(len(values)), 4)
    )
    context = (token for text in texts for token in text)
    return Sample((*writer.prefix, *context), tuple(questions))


TASKS = {
    task.name: task
    for task in (
        Task("perplexity", "real text goes on", _continuation(256), "tokens", asks=False),
        Task("copy", "a cue of 16 tokens, the 64 that follow", _copy, "tokens", asks=False),
        Task("needle", "one code, by depth", _needles(1)),
        Task("needles-2", "two codes", _needles(2)),
        Task("needles-4", "four codes", _needles(4)),
        Task("pairs", "the value of a key among many (JSON)", _pairs),
        Task("variables", "a value through a chain of assignments", _variables),
        Task("facts", "who lives where", _facts),
        Task("records", "cities and badges of people", _records),
        Task("lines", "the value of a numbered line among many", _lines),
        Task(
            "system",
            "rules of a system prompt, and a secret in it",
            instructions.make,
            "tokens",
            asks=False,
        ),
    )
}
