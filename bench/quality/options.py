"""Options of `kvpress eval`: which there are, which go together, how joined ones come apart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.options import REFERENCE

if TYPE_CHECKING:
    import torch

_OF_LM_EVAL = frozenset({"task_folder", "limit", "metadata", "chat", "max_new_tokens"})
_OF_OUR_TASKS = frozenset(
    {
        *("suite", "files", "protocol", "quick", "length", "samples"),
        *(
            "text",
            "stepwise",
            "generate",
            "seed",
            "ratio",
            "by_bytes",
            "cache_dtype",
            "protect_system",
        ),
        *("ray", "shards"),
    }
)
_OF_MADE_CONTEXTS = frozenset({"quick", "text", "seed"})  # files have contexts of their own


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which of our tasks are run, or those in files, and how."""

    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="offline, retrieval, a task, or a name in --files; repeat or join with commas.",
            show_default="offline; of --files all",
        ),
    ] = None
    files: Annotated[
        Path | None,
        typer.Option(
            help="A folder of JSON files with prompts and answers, as MiniLongBench's.",
            show_default="none",
        ),
    ] = None
    protocol: Annotated[
        str, typer.Option(help="Is the question known while compressing? hidden, visible, or both.")
    ] = "both"
    quick: Annotated[bool, typer.Option("--quick", help="Short contexts, few samples.")] = False
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a context, with --files at most; repeatable.",
            show_default="the suite's",
            min=128,
        ),
    ] = None
    samples: Annotated[
        int | None, typer.Option(help="Contexts per length.", show_default="the suite's", min=1)
    ] = None
    text: Annotated[
        Path | None, typer.Option(help="A text for the contexts.", show_default=REFERENCE)
    ] = None
    stepwise: Annotated[
        bool, typer.Option("--stepwise", help="Feed answers token by token, as when decoding.")
    ] = False
    generate: Annotated[
        bool, typer.Option("--generate", help="Decode answers greedily besides, and score them.")
    ] = False
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0
    ratio: Annotated[
        list[str] | None,
        typer.Option(
            help="Compressions: 4 gives policies without a budget budget=0.25; repeat or join.",
            show_default="budgets as given",
        ),
    ] = None
    by_bytes: Annotated[
        bool,
        typer.Option(
            "--by-bytes",
            help="--ratio is of all bytes held, against bfloat16: budgets are sought that hold so"
            " many of a context.",
        ),
    ] = False
    protect_system: Annotated[
        bool, typer.Option("--protect-system", help="Never evict a system prompt; of task system.")
    ] = False
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of stored keys and values: float32, bfloat16 or float16.",
            show_default="the model's",
        ),
    ] = None

    @property
    def names(self) -> list[str]:
        """The suites, tasks or files that were asked for."""
        return [name for given in self.suite or () for name in given.split(",")]

    def check(self) -> None:
        """Raises typer.BadParameter for what would change nothing."""
        if self.protect_system and "system" not in self.names:
            raise typer.BadParameter(
                "--protect-system changes nothing without the task system, the only one with a"
                " system prompt. Add --suite system, or leave it out."
            )
        if self.by_bytes and (not self.ratio or len(self.length or ()) != 1 or self.files):
            raise typer.BadParameter(
                "--by-bytes seeks the budgets of ratios for contexts of one length, since bytes"
                " that are not of slots weigh more in short ones. Give --ratio and one --length,"
                " without --files."
            )


def stored_as(name: str | None, policies: Iterable[str]) -> torch.dtype | None:
    """The dtype of --cache-dtype. Raises typer.BadParameter."""
    import torch
    from kvpress.bench.common.candidates import CACHES
    from kvpress.bench.common.models import DTYPES

    if name is None:
        return None
    if name not in DTYPES:
        raise typer.BadParameter(f"--cache-dtype {name}: allowed are {', '.join(DTYPES)}.")
    if theirs := sorted(CACHES.keys() & set(policies)):
        raise typer.BadParameter(
            f"--cache-dtype cannot be used with {', '.join(theirs)}, which store what the model"
            " computes. Evaluate them without it, in a file of their own."
        )
    made: torch.dtype = getattr(torch, name)
    return made


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """Which tasks of lm-eval are run instead, and how."""

    lm_eval: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval instead, joined with commas.", show_default="none"),
    ] = None
    task_folder: Annotated[
        Path | None,
        typer.Option(help="Where lm-eval finds tasks of your own.", show_default="none"),
    ] = None
    limit: Annotated[
        int | None, typer.Option(help="Documents per task of lm-eval.", show_default="all", min=1)
    ] = None
    metadata: Annotated[
        str | None,
        typer.Option(
            help="JSON for lm-eval's tasks: '{\"max_seq_lengths\": [4096]}' for ruler.",
            show_default="none",
        ),
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts of lm-eval through the model's chat template.")
    ] = False
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Of lm-eval's answers.", show_default="the task's", min=1)
    ] = None


def refuse_idle(context: typer.Context) -> None:
    """Refuses options that would change nothing beside others. Raises typer.BadParameter."""
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    if "lm_eval" in given:
        _refuse(given & _OF_OUR_TASKS, "cannot be used with --lm-eval, whose tasks are its own")
        return
    _refuse(given & _OF_LM_EVAL, "cannot be used without --lm-eval")
    if "files" in given:
        _refuse(given & _OF_MADE_CONTEXTS, "cannot be used with --files, whose prompts are given")


def _refuse(names: set[str], why: str) -> None:
    if names:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
        raise typer.BadParameter(f"{options} {why}. Leave it out.")


def metadata_of(text: str | None) -> dict[str, Any]:
    """A JSON object, empty without a text. Raises typer.BadParameter."""
    try:
        made = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"--metadata {text} is no JSON: {error}.") from error
    if not isinstance(made, dict):
        raise typer.BadParameter(f"--metadata {text} is no JSON object, as '{{\"key\": 1}}' is.")
    return made


def split_policies(given: Sequence[str]) -> Iterator[str]:
    """Policies joined with commas, which also join the options of one: `a,b:x=1,y=2,c`."""
    for text in given:
        parts: list[str] = []
        for piece in text.split(","):
            if parts and "=" in piece and ":" not in piece.split("=")[0]:
                parts[-1] += f",{piece}"
            else:
                parts.append(piece)
        yield from parts
