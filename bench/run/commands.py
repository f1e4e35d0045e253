"""The command line of the main job: `kvpress run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import AsJson, PromptOptions, TieredOptions, use_threads
from kvpress.bench.common.ranks import ParallelOptions
from rich.console import Console

from kvpress.report.tables import Fitted

if TYPE_CHECKING:
    from kvpress.bench.common.text import Text
    from kvpress.bench.run.job import Result
    from kvpress.bench.run.session import Session

console = Console()
POLICIES = ["full"]


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How tokens are chosen, and what is shown of them."""

    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 64
    sample: Annotated[bool, typer.Option(help="Sample instead of greedy decoding.")] = False
    temperature: Annotated[float, typer.Option(help="For --sample.", min=0.01)] = 1.0
    seed: Annotated[int, typer.Option(help="For --sample.")] = 0
    page_size: Annotated[int, typer.Option(help="Slots per page.")] = 16
    stream: Annotated[bool, typer.Option(help="Show the text as it comes.")] = True
    layers: Annotated[bool, typer.Option(help="Show the ledger layer by layer.")] = False

    @property
    def generation(self) -> dict[str, Any]:
        """What `generate` takes."""
        sampling = {"do_sample": True, "temperature": self.temperature}
        return sampling if self.sample else {"do_sample": False}


@command("kvpress run --policy full --policy keyformer:budget=0.5 --prompt-tokens 2000")
def run(
    asking: PromptOptions,
    decoding: DecodingOptions,
    loading: TieredOptions,
    parts: ParallelOptions,
    policy: Annotated[
        list[str], typer.Option(help="name:key=value,… ; repeat to compare.")
    ] = POLICIES,
    batch_file: Annotated[
        Path | None,
        typer.Option(help="A text file with one prompt per line.", show_default="none"),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="Length of the default prompt.", min=64)
    ] = 4000,
    question: Annotated[
        str | None,
        typer.Option(
            help="Question at the end of the default prompt.", show_default="about assert"
        ),
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(help="Saves the chat here, and goes on with it.", show_default="none"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Generate with one or more policies and compare bytes, slots and speed.

    Without a prompt, about 4,000 tokens of Python's language reference are used, with a question at
    the end. With --session the next run with the same file and another --prompt goes on with the
    chat: only the new turn is read.
    """
    from kvpress.bench.common.candidates import warm_up
    from kvpress.bench.common.loading import quiet

    from kvpress.policy.loading import parse

    for recipe in policy:
        parse(recipe)  # refuse a wrong policy, or wrong caps, before a model is loaded
    caps, text = loading.caps, asking.given(batch_file)
    talk = _session(session, asking, policy, text, batch_file)
    use_threads(loading.threads)
    source = parts.divided(loading.source)
    if talk is not None and source.tp is not None:
        raise typer.BadParameter(f"--session {session} is the file of one process: leave out --tp.")
    with quiet() if as_json else console.status(f"Loading {loading.model} …"):
        loaded, tokenizer = source.load()
    by_line, chat = batch_file is not None, asking.chat and talk is None
    named, prompts = _prompts(text, by_line, tokenizer, chat, prompt_tokens, question)
    warm_up(loaded)
    job = partial(_one, loaded, tokenizer, prompts, talk, decoding=decoding, caps=caps)
    job = partial(job, hidden=as_json)
    _show([replace(job(recipe), text=named.to_dict()) for recipe in policy], as_json)


def _one(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    talk: Session | None,
    recipe: str,
    *,
    decoding: DecodingOptions,
    caps: dict[str, Any],
    hidden: bool,
) -> Result:
    """Runs one policy, and shows its text where nothing is hidden."""
    import torch
    from kvpress.bench.run import job

    torch.manual_seed(decoding.seed)
    with _Showing(recipe, decoding.stream, hidden) as shown:
        result = job.run(
            model,
            tokenizer,
            prompts,
            recipe,
            max_new_tokens=decoding.max_new_tokens,
            page_size=decoding.page_size,
            on_text=shown.on_text,
            caps=caps,
            session=talk,
            **decoding.generation,
        )
    if not hidden:
        _finish(result, decoding.stream, decoding.layers)
    return result


def _show(results: Sequence[Result], as_json: bool) -> None:
    """Prints the table with its notes, or JSON."""
    from kvpress.bench.run.job import table

    if as_json:
        sys.stdout.write(json.dumps([result.to_dict() for result in results], indent=2) + "\n")
        return
    console.print(Fitted(table(results)))
    for result in results:
        if result.resumed_tokens is not None:
            console.print(f"{result.resumed_tokens:,} tokens of the session were not read again.")
    for note in dict.fromkeys(f"{r.policy}: {note}" for r in results for note in r.report.notes):
        console.print(f"Note: {note}", highlight=False, markup=False)


def _session(
    path: Path | None,
    asking: PromptOptions,
    policies: Sequence[str],
    text: Text | None,
    batch_file: Path | None,
) -> Session | None:
    """The chat of a file. Raises BadParameter for what is no single chat."""
    from kvpress.bench.run.session import Session

    if path is None:
        return None
    if len(policies) > 1 or batch_file is not None:
        raise typer.BadParameter(
            f"--session {path} is one chat: give one --policy, and no --batch-file."
        )
    if text is None:
        raise typer.BadParameter(
            f"--session {path}: give its next turn as --prompt or --prompt-file."
        )
    return Session(path, asking.chat)


def _prompts(
    text: Text | None, by_line: bool, tokenizer: Any, chat: bool, tokens: int, question: str | None
) -> tuple[Text, list[str]]:
    """The text, and the prompts that are made of it."""
    from kvpress.bench.common.prompt import QUESTION, as_chat, reference_prompt
    from kvpress.bench.common.text import default_text

    if text is None:
        return default_text(), [reference_prompt(tokenizer, tokens, question or QUESTION)]
    whole = [text.content]
    if by_line:
        whole = [line for line in text.content.splitlines() if line.strip()]
    return text, [as_chat(tokenizer, each) for each in whole] if chat else whole


class _Showing:
    """One policy on the terminal: its name, a spinner until the first text comes, the text."""

    def __init__(self, recipe: str, stream: bool, hidden: bool) -> None:
        self._recipe, self._hidden = recipe, hidden
        self._status = None if hidden else console.status("Reading the prompt …")
        self.on_text = self._show if stream and not hidden else None

    def __enter__(self) -> _Showing:
        if self._status is not None:
            console.rule(f"[bold]{self._recipe}", align="left")
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _show(self, text: str) -> None:
        self.__exit__()
        console.print(text, end="", highlight=False, markup=False, soft_wrap=True)


def _finish(result: Result, streamed: bool, layers: bool) -> None:
    console.print()
    for text in result.texts[1 if streamed else 0 :]:
        console.print(f"> {text}", highlight=False, markup=False)
    if layers:
        console.print(result.report)
