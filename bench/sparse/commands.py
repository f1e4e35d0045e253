"""The command line of sparse prompt attention: `kvpress bench sparse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import ModelOptions, use_threads
from rich.console import Console

from kvpress.report.tables import Fitted, new_table

console, errors = Console(), Console(stderr=True)


@command("kvpress bench sparse --tokens 8000 --tokens 16000 --rounds 1")
def sparse(
    loading: ModelOptions,
    policy: Annotated[str, typer.Option(help="A policy that makes prompts sparse.")] = "sale",
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Of a prompt; repeatable.", show_default="those of --read", min=128),
    ] = None,
    read: Annotated[int, typer.Option(help="Tokens that the model reads itself.")] = 8000,
    layers: Annotated[int, typer.Option(help="How many layers, evenly spread.", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 3,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file for the results.", show_default="none")
    ] = None,
) -> None:
    """Time prompt attention of single layers beside PyTorch's, both in turn.

    Queries, keys and values are those that the layers of the model hand over for a text. It reads
    `--read` tokens at a time; longer prompts are such parts one after the other, turned to the
    positions where they then stand; beyond the model's context as YaRN has it.
    """
    from kvpress.bench.calibrate.thresholds import thresholds_of
    from kvpress.bench.common.environment import environment
    from kvpress.bench.common.output import check_writable, write_json
    from kvpress.bench.common.text import default_text
    from kvpress.bench.sparse import report

    check_writable("--out", out)
    use_threads(loading.threads)
    with errors.status(f"Loading {loading.model} …"):
        loaded, tokenizer = loading.source.load()
    limits, text = thresholds_of(loaded, policy), default_text()
    rows = _rows(loaded, tokenizer, limits, text.content, tokens or [read], read, layers, rounds)
    console.print(table(rows))
    if out is not None:
        settings = {"model": loading.model, "policy": policy, "read": read, "rounds": rounds}
        dtype = str(loaded.dtype).removeprefix("torch.")
        settings |= {"dtype": dtype, **loading.source.load_options, "text": text.to_dict()}
        write_json(out, report.to_record(rows, environment(loaded.device), settings))


def _rows(
    model: Any,
    tokenizer: Any,
    limits: Any,
    text: str,
    lengths: list[int],
    read: int,
    layers: int,
    rounds: int,
) -> list[Any]:
    """The measurements of some layers, evenly spread, at every length."""
    from kvpress.bench.common.prompt import parts
    from kvpress.bench.sparse import measure
    from kvpress.bench.sparse.captured import Captured

    last = len(limits.tau_LN) - 1
    chosen = sorted({round(i * last / max(1, layers - 1)) for i in range(layers)})
    with errors.status("Reading the text …"):
        texts = parts(model, tokenizer, text, read, -(-max(lengths) // read))
        captured = Captured(model, texts, set(chosen))
    rows = []
    for length in lengths:
        for layer in chosen:
            with errors.status(f"{length:,} tokens, layer {layer} …"):
                given = captured.of_length(layer, length)
                warm = layer != chosen[0]  # by the layer before
                tau_N = limits.tau_LN[layer]
                rows.append(measure.measure(layer, given, tau_N, limits.local, rounds, warm))
    return rows


def table(rows: list[Any]) -> Fitted:
    """All layers of a length in a line: times, shares of the exact one, density and error."""
    from kvpress.bench.sparse import report

    shown = new_table((), report.HEAD, "Prompt attention, exact and sparse", [report.LEGEND])
    for one in report.totals(rows):
        shown.add_row(*report.cells_of(one))
    return Fitted(shown)
