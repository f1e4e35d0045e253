"""The command line of sparse prompt attention: `kvpress bench sparse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from kvpress.bench.common import options
from kvpress.bench.common.models import Source
from rich.console import Console

from kvpress.report.tables import Fitted

console, errors = Console(), Console(stderr=True)


def sparse(
    model: options.Model = "demo",
    policy: Annotated[str, typer.Option(help="A policy that makes prompts sparse.")] = "sale",
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prompt; repeatable.", min=128)
    ] = None,
    read: Annotated[int, typer.Option(help="Tokens that the model reads itself.")] = 8000,
    layers: Annotated[int, typer.Option(help="How many layers, evenly spread.", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 3,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
) -> None:
    """Time prompt attention of single layers beside PyTorch's, both in turn.

    Queries, keys and values are those that the layers of the model hand over for a text. It reads
    `--read` tokens at a time; longer prompts are such parts one after the other, turned to the
    positions where they then stand; beyond the model's context as YaRN has it.
    """
    import torch
    from kvpress.bench.calibrate.thresholds import thresholds_of
    from kvpress.bench.common.environment import environment
    from kvpress.bench.common.output import check_writable, write_json
    from kvpress.bench.common.prompt import parts
    from kvpress.bench.common.text import default_text
    from kvpress.bench.sparse import measure, report
    from kvpress.bench.sparse.captured import Captured

    check_writable("--out", out)
    if threads:
        torch.set_num_threads(threads)
    source = Source(model, dtype, device, device_map, revision, trust_remote_code)
    with errors.status(f"Loading {model} …"):
        loaded, tokenizer = source.load()
    limits = thresholds_of(loaded, policy)
    count = len(limits.tau_LN)
    chosen = sorted({round(i * (count - 1) / max(1, layers - 1)) for i in range(layers)})
    lengths, text = tokens or [read], default_text()
    with errors.status("Reading the text …"):
        texts = parts(loaded, tokenizer, text.content, read, -(-max(lengths) // read))
        captured = Captured(loaded, texts, set(chosen))
    rows = []
    for length in lengths:
        for layer in chosen:
            with errors.status(f"{length:,} tokens, layer {layer} …"):
                given = captured.of_length(layer, length)
                tau_N = limits.tau_LN[layer]
                warm = layer != chosen[0]  # by the layer before
                rows.append(measure.measure(layer, given, tau_N, limits.local, rounds, warm))
    console.print(Fitted(table(rows)))
    if out is not None:
        facts = environment(loaded.device)
        settings = {"model": model, "policy": policy, "read": read, "rounds": rounds}
        settings |= {"dtype": str(loaded.dtype).removeprefix("torch."), **source.load_options}
        settings["text"] = text.to_dict()
        made = [row._asdict() for row in rows]
        whole = {"bench": report.KIND, "environment": facts, "settings": settings, "rows": made}
        write_json(out, whole)


def table(rows: list[Any]) -> Any:
    """All layers of a length in a line: times, shares of the exact one, density and error."""
    from kvpress.bench.sparse import report
    from rich.table import Table

    shown = Table(title="Prompt attention, exact and sparse", title_justify="left")
    for title in report.HEAD:
        shown.add_column(title, justify="right")
    for one in report.totals(rows):
        shown.add_row(*report.cells_of(one))
    shown.caption = report.LEGEND
    return shown
