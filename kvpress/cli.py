"""The command line: `kvpress run`, `eval`, `report`, `plot`, `bench`, `policies`, and others."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvpress import __version__, env
from kvpress.bench.calibrate.commands import calibrate
from kvpress.bench.commands import bench
from kvpress.bench.pages import plot, report
from kvpress.bench.quality.commands import evaluate
from kvpress.bench.view.commands import view
from kvpress.errors import KVPressError

app = typer.Typer(
    help="A KV-cache compression engine for Hugging Face models that really frees the bytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)
app.add_typer(bench, name="bench")
app.add_typer(calibrate, name="calibrate")
app.command("eval")(evaluate)
app.command()(report)
app.command()(plot)
app.command()(view)


@app.command()
def run(
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face id, or a path.")] = "demo",
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
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, … (default: a GPU if there is one)")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
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

    from kvpress.bench import models
    from kvpress.bench import run as bench
    from kvpress.loading import parse

    recipes = policy or [bench.BASELINE]
    for recipe in recipes:
        parse(recipe)  # refuse a wrong policy before a model is loaded
    texts = _prompts(prompt, prompt_file, batch_file)
    if threads:
        torch.set_num_threads(threads)
    quiet = as_json
    with console.status(f"Loading {model} …") if not quiet else models.quiet():
        loaded, tokenizer = models.load(model, dtype, device)
    wrapped = _wrap(texts, tokenizer, chat, prompt_tokens, question)
    bench.warm_up(loaded)
    results = []
    for recipe in recipes:
        torch.manual_seed(seed)
        if not quiet:
            console.rule(f"[bold]{recipe}", align="left")
        with _Waiting("Reading the prompt …", hidden=quiet) as waiting:
            result = bench.run(
                loaded,
                tokenizer,
                wrapped,
                recipe,
                max_new_tokens=max_new_tokens,
                page_size=page_size,
                on_text=waiting.show if stream and not quiet else None,
                do_sample=sample,
                **({"temperature": temperature} if sample else {}),
            )
        results.append(result)
        if not quiet:
            _finish(result, stream, layers)
    if as_json:
        sys.stdout.write(json.dumps([result.to_dict() for result in results], indent=2) + "\n")
    else:
        console.print(bench.table(results))
        for note in dict.fromkeys(
            f"{r.policy}: {note}" for r in results for note in r.report.notes
        ):
            console.print(f"Note: {note}", highlight=False, markup=False)


@app.command()
def policies(
    markdown: Annotated[bool, typer.Option(help="The table of the README.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the installed policies with their options."""
    from kvpress import catalogue

    entries = catalogue.entries()
    if as_json:
        sys.stdout.write(json.dumps([entry._asdict() for entry in entries], indent=2) + "\n")
        return
    if markdown:
        sys.stdout.write(catalogue.markdown() + "\n")
        return
    table = Table("policy", "what it does", "options", show_lines=True)
    for entry in entries:
        options = "\n".join(
            f"{n}={default}  {text}" for n, (default, text) in entry.options.items()
        )
        table.add_row(entry.name, entry.summary, options)
    console.print(table)


@app.command()
def build() -> None:
    """Compile the CPU operators now, for images and for measurements that must not wait."""
    from kvpress import native

    console.print(f"The CPU operators are built: {native.build()}", highlight=False, soft_wrap=True)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Show versions, devices, operators with their backends, and why a backend is not there."""
    facts = _facts()
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    for title, values in facts.items():
        table = Table(title, "", show_header=True, title_justify="left")
        for key, value in values.items():
            table.add_row(key, str(value))
        console.print(table)


def _facts() -> dict[str, dict[str, Any]]:
    import torch

    from kvpress import ops

    names = ("torch", "transformers", "accelerate", "safetensors", "triton", "gguf", "lm-eval")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": (
            {"kvpress-engine": __version__, "python": platform.python_version()}
            | {n: _version(n) for n in names}
        ),
        "devices": {
            "cpu": (
                f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
            ),
            "cuda": ", ".join(gpus) or "none: torch sees no CUDA device",
        },
        "operators": {
            f"{name} on {device}": backend
            for device, backend in ops.backends().items()
            for name in ops.names()
        },
        "environment": {name: f"{_setting(name)} – {text}" for name, text in env.VARIABLES.items()},
    }


def _setting(name: str) -> str:
    return str(env.cache_folder()) if name == "KVPRESS_CACHE" else os.environ.get(name, "not set")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _prompts(
    prompt: str | None, prompt_file: Path | None, batch_file: Path | None
) -> list[str] | None:
    given = [source for source in (prompt, prompt_file, batch_file) if source is not None]
    if len(given) > 1:
        raise typer.BadParameter("give only one of --prompt, --prompt-file and --batch-file")
    if batch_file is not None:
        return [line for line in _read(batch_file).splitlines() if line.strip()]
    if prompt_file is not None:
        return [_read(prompt_file)]
    return None if prompt is None else [prompt]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as UTF-8 text: {error}") from error


def _wrap(
    texts: list[str] | None, tokenizer: Any, chat: bool, tokens: int, question: str | None
) -> list[str]:
    from kvpress.bench.prompt import QUESTION, as_chat, reference_prompt

    if texts is None:
        return [reference_prompt(tokenizer, tokens, question or QUESTION)]
    return [as_chat(tokenizer, text) for text in texts] if chat else texts


class _Waiting:
    """A spinner until the first text comes, or until the block ends."""

    def __init__(self, message: str, hidden: bool) -> None:
        self._status = None if hidden else console.status(message)

    def __enter__(self) -> _Waiting:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def show(self, text: str) -> None:
        """Prints a piece of the answer as it comes."""
        self.__exit__()
        console.print(text, end="", highlight=False, markup=False, soft_wrap=True)


def _finish(result: Any, streamed: bool, layers: bool) -> None:
    console.print()
    for text in result.texts[1 if streamed else 0 :]:
        console.print(f"> {text}", highlight=False, markup=False)
    if layers:
        console.print(result.report)


def main() -> None:
    """The entry point: engine errors become one message and exit status 2."""
    try:
        app()
    except KVPressError as error:
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), highlight=False, markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
