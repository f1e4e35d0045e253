"""The command line of reports of evaluations and benchmarks: `kvpress report`, `kvpress plot`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.journal import text_of
from kvpress.bench.common.output import write

from kvpress.errors import KVPressError

File = Annotated[Path, typer.Argument(help="What `kvpress eval` or `bench` wrote with --out.")]


class PageError(KVPressError, ValueError):
    """A file that cannot be made or is not of a kind that can be shown."""


@command("kvpress report quality.jsonl --out quality.html")
def report(
    results: File,
    out: Annotated[
        Path | None,
        typer.Option(help="A .html page with plots, or .md.", show_default="Markdown, printed"),
    ] = None,
) -> None:
    """Make one page of an evaluation or of benchmarks: all tables, and the plots."""
    from kvpress.bench.common.page import page
    from kvpress.bench.common.report import markdown

    if out is not None and out.suffix not in (".html", ".md"):
        raise PageError(f"--out {out}: the name must end in .html or .md.")
    made = _report(results)
    if out is None:
        sys.stdout.write(markdown(made))
        return
    text = page(made) if out.suffix == ".html" else markdown(made)
    write(out, text.encode())


@command("kvpress plot quality.jsonl --what needles --out needles.svg")
def plot(
    results: File,
    out: Annotated[Path, typer.Option(help="A .png, .svg or .pdf.")] = Path("plot.png"),
    what: Annotated[
        str, typer.Option(help="Of an evaluation: quality (against bytes) or needles.")
    ] = "quality",
) -> None:
    """Draw an evaluation, or tokens per second and peak bytes over lengths and batches."""
    from kvpress.bench.common.figures import picture

    if out.suffix not in (".png", ".svg", ".pdf"):
        raise PageError(f"--out {out}: the name must end in .png, .svg or .pdf.")
    if what not in ("quality", "needles"):
        raise PageError(f"--what {what} is unknown; allowed: quality, needles.")
    figure = _figure(results, what)
    write(out, picture(figure, out.suffix[1:]))


def _is_of_benchmarks(path: Path) -> bool:
    """Whether the rows of a file are those of `kvpress bench`."""
    try:
        return "bench" in json.loads(text_of(path).partition("\n")[0])
    except (OSError, EOFError, ValueError):
        return False  # the reader of evaluations says what is wrong


def _report(path: Path) -> Any:
    from kvpress.bench.common.journal import record_of
    from kvpress.bench.distill import report as heads
    from kvpress.bench.retrieval import report as retrieval
    from kvpress.bench.serving import report as serving
    from kvpress.bench.sparse import report as sparse
    from kvpress.bench.tiers import report as tiers

    record = record_of(path) or {}
    for made in (sparse, tiers, retrieval, heads, serving):
        if record.get("bench") == made.KIND:
            return made.report(record)
    if _is_of_benchmarks(path):
        from kvpress.bench.common.journal import read
        from kvpress.bench.speed import report as speed

        return speed.report(read(path))
    from kvpress.bench.quality import report as quality
    from kvpress.bench.quality.results import load

    return quality.report(load(path))


def _figure(path: Path, what: str) -> Any:
    from kvpress.bench.common.journal import record_of
    from kvpress.bench.distill import report as heads
    from kvpress.bench.retrieval import report as retrieval
    from kvpress.bench.sparse import report as sparse

    record = record_of(path) or {}
    for made in (sparse, retrieval, heads):
        if record.get("bench") == made.KIND:
            return made.figure(made.rows_of(record))
    if _is_of_benchmarks(path):
        from kvpress.bench.common.journal import read
        from kvpress.bench.speed.report import drawn

        return drawn(read(path), path)
    from kvpress.bench.common.figures import PlotError
    from kvpress.bench.quality import plots, table
    from kvpress.bench.quality.results import load

    cells = load(path)
    chosen = list(table.blocks(cells))
    figure = (
        plots.needles(cells) if what == "needles" else plots.quality(chosen) if chosen else None
    )
    if figure is None:
        raise PlotError(f"{path} holds nothing to draw for --what {what}. Evaluate that first.")
    return figure
