"""Tasks from a folder of JSON files, shaped as MiniLongBench's: one task per file.

A file maps an index to an object with `origin_prompt`, the whole prompt with its question inside,
and `gold`, the right answers: a text, several, or an object with `answers`. Whatever else the
object holds (an earlier prediction, classes, seconds) is not looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from kvpress.bench.quality.sample import Sample, TaskError, Writer
from kvpress.bench.quality.suites import VISIBLE, Plan
from kvpress.bench.quality.tasks import Task

from kvpress.errors import KVPressError, did_you_mean

_SHAPE = (
    "A file maps an index to an object with 'origin_prompt' (a text) and 'gold' (a text, several,"
    " or an object with 'answers')."
)


class FilesError(KVPressError, ValueError):
    """A folder or a file from which no prompts can be taken."""


class Entry(NamedTuple):
    """A whole prompt, and what should follow it: the first of the right answers."""

    prompt: str
    answer: str


def read(
    folder: Path, names: Sequence[str] = (), protocols: Sequence[str] = (VISIBLE,)
) -> dict[str, list[Entry]]:
    """The entries of the files with these names (without `.json`), or of all.

    Raises FilesError, also where the protocols do not allow a question that is visible.
    """
    if VISIBLE not in protocols:
        raise FilesError(
            f"--protocol {protocols[0]}: the question stands inside the prompt of a file, and can"
            f" only be {VISIBLE}. Leave --protocol out."
        )
    found = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if not found:
        what = "holds no .json file" if folder.is_dir() else "is not a folder"
        raise FilesError(f"--files {folder} {what}. Give a folder of JSON files. {_SHAPE}")
    for name in names:
        if name not in found:
            raise FilesError(f"{folder} has no file {name}.json.{did_you_mean(name, found)}")
    return {name: _entries(found[name]) for name in names or found}


def identity(folder: Path) -> dict[str, str]:
    """What a record says of a folder: its name, and the SHA-256 of all its files."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        whole.update(path.name.encode() + b"\n" + path.read_bytes())
    return {"name": folder.resolve().name, "sha256": whole.hexdigest()}


def plans(
    files: Mapping[str, Sequence[Entry]],
    lengths: Sequence[int],
    samples: int | None,
    positions: int | None,
) -> list[Plan]:
    """What is to be run: the first `samples` entries of every file, at every length.

    lengths: the most tokens of a prompt; longer ones lose their middle. positions: those that the
    model has, the length if none is given; None where it does not say. Raises FilesError.
    """
    limits = _limits(lengths, positions)
    made = []
    for name, entries in files.items():
        make, size = partial(_sample, entries, positions), len(entries)
        task = Task(name, f"{size} prompts from a file", make, metric="tokens")
        made += [Plan(task, tokens, min(samples or size, size), VISIBLE) for tokens in limits]
    return made


def positions(model: Any) -> int | None:
    """How many tokens the model takes, where it says so."""
    config = model.config.get_text_config(decoder=True)
    made: int | None = getattr(config, "max_position_embeddings", None)
    return made


def _limits(lengths: Sequence[int], positions: int | None) -> list[int]:
    if positions is not None and max(lengths, default=0) > positions:
        raise FilesError(
            f"--length {max(lengths)}: the model has {positions} positions. Give a shorter one."
        )
    if lengths:
        return list(dict.fromkeys(lengths))
    if positions is None:
        raise FilesError("The model does not say how many tokens it takes. Give --length.")
    return [positions]


def _sample(
    entries: Sequence[Entry],
    positions: int | None,
    writer: Writer,
    generator: Random,
    tokens: int,
    index: int,
) -> Sample:
    """The prompt as a question, to be visible; no more tokens than the model has positions for."""
    question = writer.question(*entries[index])
    room = tokens if positions is None else min(tokens, positions - len(question.answer))
    room -= len(writer.prefix)
    if room < 2:
        raise TaskError(
            f"The answer of {len(question.answer)} tokens leaves no room for a prompt in the"
            f" model's {positions} positions. Take it out of the file, or take another model."
        )
    return Sample(writer.prefix, (replace(question, prompt=_middle_out(question.prompt, room)),))


def _middle_out(tokens: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The first and last half of what is allowed, as LongBench truncates (arXiv 2308.14508)."""
    if len(tokens) <= limit:
        return tokens
    first = limit // 2
    return tokens[:first] + tokens[first - limit :]


def _entries(path: Path) -> list[Entry]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FilesError(f"{path} cannot be read as JSON: {error}. {_SHAPE}") from error
    if not isinstance(content, dict) or not content:
        raise FilesError(f"{path} is no JSON object with entries. {_SHAPE}")
    return [_entry(f"{path}, entry {index!r}", given) for index, given in content.items()]


def _entry(where: str, given: Any) -> Entry:
    prompt, gold = (_field(where, given, name) for name in ("origin_prompt", "gold"))
    if isinstance(gold, dict):
        gold = _field(f"{where}, 'gold'", gold, "answers")
    answer = gold[0] if isinstance(gold, list) and gold else gold
    for name, text in (("origin_prompt", prompt), ("gold", answer)):
        if not isinstance(text, str) or not text.strip():
            raise FilesError(f"{where}: {name!r} is empty or no text. {_SHAPE}")
    # A prompt that ends with a word or a colon is gone on with after a space.
    apart = prompt[-1].isspace() or answer[0].isspace()
    return Entry(prompt, answer if apart else f" {answer}")


def _field(where: str, given: Any, name: str) -> Any:
    if not isinstance(given, dict) or name not in given:
        raise FilesError(f"{where} has no {name!r}. {_SHAPE}")
    return given[name]
