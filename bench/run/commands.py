"""The command line of the main job: `kvpress run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common import options
from kvpress.bench.common.models import Source
from rich.console import Console

from kvpress.report.tables import Fitted

if TYPE_CHECKING:
    from kvpress.bench.common.text import Text
    from kvpress.bench.run.job import Result

console = Console()
GIVEN = "--prompt"  # the name of a text that stands on the command line


def run(
    model: options.Model = "demo",
    policy: Annotated[
        list[str] | None, typer.Option(help="name:key=value,… ; repeat to compare.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text file that is the prompt.")
    ] = None,
    batch_file: Annotated[
        Path | None, typer.Option(help="A text file with one prompt per line.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="Length of the default prompt.", min=64)
    ] = 4000,
    question: Annotated[
        str | None, typer.Option(help="Question at the end of the default prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    chat: Annotated[bool, typer.Option(help="Wrap prompts in the model's chat template.")] = True,
    sample: Annotated[bool, typer.Option(help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float, typer.Option(help="For --sample.", min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option(help="For --sample.")] = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    page_size: Annotated[int, typer.Option(help="Slots per page.")] = 16,
    stream: Annotated[bool, typer.Option(help="Show the text as it comes.")] = True,
    layers: Annotated[bool, typer.Option(help="Show the ledger layer by layer.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results as JSON and nothing else.")
    ] = False,
) -> None:
    """Generate with one or more policies and compare bytes, slots and speed.

    Without a prompt, about 4,000 tokens of Python's language reference are used, with a question at
    the end.
    """
    import torch
    from kvpress.bench.common.candidates import warm_up
    from kvpress.bench.common.loading import quiet
    from kvpress.bench.run import job as bench

    from kvpress.policy.loading import parse

    recipes = policy or [bench.BASELINE]
    for recipe in recipes:
        parse(recipe)  # refuse a wrong policy before a model is loaded
    text = _given(prompt, prompt_file, batch_file)
    if threads:
        torch.set_num_threads(threads)
    source = Source(model, dtype, device, device_map, revision, trust_remote_code)
    with quiet() if as_json else console.status(f"Loading {model} …"):
        loaded, tokenizer = source.load()
    named, prompts = _prompts(
        text, batch_file is not None, tokenizer, chat, prompt_tokens, question
    )
    sampling = {"do_sample": True, "temperature": temperature} if sample else {"do_sample": False}
    warm_up(loaded)
    results = []
    for recipe in recipes:
        torch.manual_seed(seed)
        with _Showing(recipe, stream, hidden=as_json) as shown:
            result = bench.run(
                loaded,
                tokenizer,
                prompts,
                recipe,
                max_new_tokens=max_new_tokens,
                page_size=page_size,
                on_text=shown.on_text,
                **sampling,
            )
        results.append(replace(result, text=named.to_dict()))
        if not as_json:
            _finish(result, stream, layers)
    _show(results, as_json)


def _show(results: Sequence[Result], as_json: bool) -> None:
    """Prints the table with its notes, or JSON."""
    from kvpress.bench.run.job import table

    if as_json:
        sys.stdout.write(json.dumps([result.to_dict() for result in results], indent=2) + "\n")
        return
    console.print(Fitted(table(results)))
    for note in dict.fromkeys(f"{r.policy}: {note}" for r in results for note in r.report.notes):
        console.print(f"Note: {note}", highlight=False, markup=False)


def _given(prompt: str | None, prompt_file: Path | None, batch_file: Path | None) -> Text | None:
    """The text of the prompts, None for the default one. Raises BadParameter or TextError."""
    from kvpress.bench.common.text import Text, read_text

    if sum(source is not None for source in (prompt, prompt_file, batch_file)) > 1:
        raise typer.BadParameter("give only one of --prompt, --prompt-file and --batch-file")
    if prompt is not None:
        return Text(GIVEN, prompt)
    path = prompt_file or batch_file
    return None if path is None else read_text(path)


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
