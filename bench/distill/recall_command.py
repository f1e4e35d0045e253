"""The command line that compares retrieval heads: `kvpress bench heads`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import REFERENCE, AsJson, ModelOptions, use_threads
from rich.console import Console

console, errors = Console(), Console(stderr=True)
READS = [256, 512, 1024]
HEADS = ["distilled", "self"]


@dataclass(frozen=True, kw_only=True)
class RecallOptions:
    """Which heads, on which text, and how much they may choose."""

    head: Annotated[
        list[str] | None,
        typer.Option(
            help="distilled, self, self@LAYER, or a path; repeatable.",
            show_default=", ".join(HEADS),
        ),
    ] = None
    text: Annotated[
        Path | None,
        typer.Option(help="A text, whose last fifth is read.", show_default=REFERENCE),
    ] = None
    read: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens to choose; repeatable.", show_default=", ".join(map(str, READS)), min=1
        ),
    ] = None
    tokens: Annotated[int, typer.Option(help="Of a context.", min=256)] = 4096
    contexts: Annotated[int, typer.Option(help="Of each of two kinds.", min=1)] = 4
    queries: Annotated[int, typer.Option(help="Of a context's second half.", min=1)] = 64
    page: Annotated[int, typer.Option(help="Slots of a page.", min=1)] = 32
    seed: Annotated[int, typer.Option(help="Of contexts and queries.", min=0)] = 0


@command("kvpress bench heads --head self --contexts 1 --tokens 1024 --read 128")
def heads(
    loading: ModelOptions,
    asked: RecallOptions,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file for the results.", show_default="none")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare retrieval heads: how much of the model's attention is on what they would read.

    Contexts are the last fifth of a text, which no head was trained on: as it is, and with facts
    that are asked for and passages that come again. Beside heads stand recency, chance, and the
    true attention.
    """
    from kvpress.bench.common.environment import environment
    from kvpress.bench.common.output import check_writable, write_json
    from kvpress.bench.common.progress import bar, start
    from kvpress.bench.common.report import table
    from kvpress.bench.common.text import default_text, read_text
    from kvpress.bench.distill import report
    from kvpress.bench.distill.contexts import Maker, split
    from kvpress.bench.distill.maps import Always
    from kvpress.bench.distill.recall import How, measure

    from kvpress.hf.heads.loading import load_head

    check_writable("--out", out)
    use_threads(loading.threads)
    text = default_text() if asked.text is None else read_text(asked.text)
    with errors.status(f"Loading {loading.model} …"):
        model, tokenizer = loading.source.load()
        found = {name: load_head(name, model) for name in asked.head or HEADS}
    maker = Maker(tokenizer, split(tokenizer, text.content)[1], asked.tokens)
    numbers = (asked.tokens, asked.contexts, asked.queries, asked.read or READS)
    how = How(*numbers, asked.page, asked.seed, Always())
    with bar() as shown:
        task = start(shown, 2 * how.contexts, "contexts")
        measured = measure(model, maker, found, how, lambda: shown.advance(task))
    marks = {name: head.fingerprint for name, head in found.items()}
    settings = {"model": loading.model, **how._asdict(), "always": asdict(how.always)}
    settings |= {**loading.source.load_options, "text": text.to_dict(), "heads": marks}
    record = report.to_record(measured, environment(model.device), settings)
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        for sheet in report.sheets(measured.rows):
            if sheet.head[0] == "ranking":
                console.print(table(sheet))
        console.print(report.LEGEND)
    if out is not None:
        write_json(out, record)
