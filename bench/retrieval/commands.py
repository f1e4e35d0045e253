"""The command line of rankings of pages: `kvpress bench retrieval`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import AsJson, ModelOptions, use_threads
from rich.console import Console

if TYPE_CHECKING:
    from kvpress.bench.retrieval.measure import How, Row

console, errors = Console(), Console(stderr=True)
READS = [256, 512, 1024]


@dataclass(frozen=True, kw_only=True)
class RankingOptions:
    """What is read of which prompt, and by which layers."""

    tokens: Annotated[int, typer.Option(help="Of the prompt.", min=128)] = 7400
    read: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a row, at the most; repeatable.",
            show_default=", ".join(map(str, READS)),
            min=1,
        ),
    ] = None
    layers: Annotated[int, typer.Option(help="How many layers, evenly spread.", min=1)] = 8
    queries: Annotated[int, typer.Option(help="Of the second half of the prompt.", min=1)] = 64
    page: Annotated[int, typer.Option(help="Slots of a page.", min=1)] = 32
    sink: Annotated[int, typer.Option(help="First tokens that are always read.", min=0)] = 4
    recent: Annotated[int, typer.Option(help="Last tokens that are always read.", min=0)] = 64


@command("kvpress bench retrieval --tokens 2000 --read 256 --layers 4")
def retrieval(
    loading: ModelOptions,
    asked: RankingOptions,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file for the results.", show_default="none")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare rankings of pages: how much attention is on those that a decode step would read.

    Queries, keys and values are those that layers of the model hand over for a text. Pages are
    ranked by the cells of keys that quest and leoam use, by boxes alone, by the mean query, by the
    mean radius, by recency, at random, and by their true attention. Beside what is omitted stands
    what the certificate says of it.
    """
    from kvpress.bench.common.environment import environment
    from kvpress.bench.common.output import check_writable, write_json
    from kvpress.bench.common.report import table
    from kvpress.bench.common.text import default_text
    from kvpress.bench.retrieval import report
    from kvpress.bench.retrieval.measure import How

    check_writable("--out", out)
    use_threads(loading.threads)
    how = How(
        reads=asked.read or READS,
        queries=asked.queries,
        page=asked.page,
        sink=asked.sink,
        recent=asked.recent,
    )
    with errors.status(f"Loading {loading.model} …"):
        model, tokenizer = loading.source.load()
    text = default_text()
    rows = _rows(model, tokenizer, text.content, asked, how)
    settings = {"model": loading.model, "tokens": asked.tokens, **asdict(how)}
    dtype = str(model.dtype).removeprefix("torch.")
    settings |= {"dtype": dtype, **loading.source.load_options, "text": text.to_dict()}
    record = report.to_record(rows, environment(model.device), settings)
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        for sheet in report.sheets(rows)[:1]:
            console.print(table(sheet))
        console.print(report.LEGEND)
    if out is not None:
        write_json(out, record)


def _rows(model: Any, tokenizer: Any, text: str, asked: RankingOptions, how: How) -> list[Row]:
    """The measurements of some layers, evenly spread."""
    import torch
    from kvpress.bench.common.prompt import parts
    from kvpress.bench.retrieval.measure import measure
    from kvpress.bench.sparse.captured import Captured

    last = model.config.get_text_config(decoder=True).num_hidden_layers - 1
    chosen = sorted({round(i * last / max(1, asked.layers - 1)) for i in range(asked.layers)})
    with errors.status("Reading the text …"):
        ids = parts(model, tokenizer, text, asked.tokens, 1)
        captured = Captured(model, ids, set(chosen))
    rows: list[Row] = []
    for layer in chosen:
        with errors.status(f"Layer {layer} …"), torch.inference_mode():
            rows += measure(layer, captured.of_length(layer, asked.tokens), how)
    return rows
