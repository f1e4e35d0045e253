"""The command line of the evaluation: `kvpress eval`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console, errors = Console(), Console(stderr=True)


def evaluate(
    suite: Annotated[
        list[str] | None, typer.Option(help="offline, or a task; repeat or join with commas.")
    ] = None,
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face id, or a path.")] = "demo",
    policy: Annotated[
        list[str] | None, typer.Option(help="name:key=value,… ; repeat or join with commas.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Is the question known while compressing? hidden, visible, or both.")
    ] = "both",
    quick: Annotated[bool, typer.Option("--quick", help="Short contexts, few samples.")] = False,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a context; repeatable.", min=128)
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Contexts per length.", min=1)] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A text for the contexts (default: Python's reference)."),
    ] = None,
    stepwise: Annotated[
        bool, typer.Option("--stepwise", help="Feed answers token by token, as when decoding.")
    ] = False,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval instead, joined with commas.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Where lm-eval finds tasks of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task of lm-eval.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Results as JSON lines; an interrupted run goes on from it.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cells as JSON.")] = False,
) -> None:
    """Measure quality beside bytes: what a model still knows of a context that was compressed.

    Answers are scored by teacher forcing, which equals greedy decoding where all tokens are right.
    Intervals are 95 % bootstraps over contexts; `vs full` pairs each context with the full cache.
    """
    import torch
    from kvpress.bench import models, record
    from kvpress.bench.quality import run, suites, table
    from kvpress.bench.quality.results import Results
    from kvpress.bench.quality.sample import Writer, read_text

    from kvpress.loading import parse

    names = list(dict.fromkeys(split_policies(policy or [run.FULL])))
    for name in names:
        parse(name)  # refuse a wrong policy before a model is loaded
    if threads:
        torch.set_num_threads(threads)
    if lm_eval is not None:
        with_lm_eval(lm_eval.split(","), names, model, dtype, device, task_folder, limit, as_json)
        return
    protocols = suites.PROTOCOLS if protocol == "both" else (protocol,)
    asked = [part for given in suite or ["offline"] for part in given.split(",")]
    plans = suites.plans(asked, protocols, quick, length or (), samples)
    source = None if text is None else read_text(text)
    with errors.status(f"Loading {model} …"):
        loaded, tokenizer = models.load(model, dtype, device)
    settings = {
        "model": model,
        "dtype": dtype,
        "text": None if text is None else str(text),
        "seed": seed,
        "stepwise": stepwise,
    }
    results = Results(settings, record.environment(loaded.device), out)
    fill(results, loaded, names, Writer(tokenizer, source), plans, seed, stepwise)
    if as_json:
        sys.stdout.write(json.dumps([asdict(cell) for cell in results], indent=2) + "\n")
        return
    for made in table.tables(results):
        console.print(made)
    console.print(table.LEGEND)


def fill(
    results: Any,
    model: Any,
    policies: Sequence[str],
    writer: Any,
    plans: Sequence[Any],
    seed: int,
    stepwise: bool,
) -> None:
    """Runs the cells that the results do not hold yet, with a progress bar."""
    from kvpress.bench.progress import bar
    from kvpress.bench.quality import run
    from kvpress.bench.quality.subject import InProcess

    subjects = {name: InProcess(model, name) for name in policies}
    reference = subjects.get(run.FULL) or InProcess(model, run.FULL)
    with bar() as progress:
        total = sum(plan.samples for plan in plans) * (len(subjects) + 1)
        task = progress.add_task("", total=total)

        def on_cell(cell: Any) -> None:
            progress.update(task, advance=1, description=f"{cell.task} {cell.tokens} {cell.policy}")

        judged = list(subjects.values())
        run.evaluate(reference, judged, writer, plans, results, seed, stepwise, on_cell)


def with_lm_eval(
    tasks: Sequence[str],
    policies: Sequence[str],
    model: str,
    dtype: str,
    device: str | None,
    folder: Path | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Runs tasks of lm-eval with every policy. Raises HarnessError."""
    from kvpress.bench import models
    from kvpress.bench.quality.standard import rows, table

    loaded, tokenizer = models.load(model, dtype, device)
    made = rows(loaded, tokenizer, policies, tasks, folder, limit)
    if as_json:
        sys.stdout.write(json.dumps([row._asdict() for row in made], indent=2) + "\n")
    else:
        console.print(table(made))


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


def report(
    results: Annotated[Path, typer.Argument(help="A file that `kvpress eval --out` made.")],
    out: Annotated[
        Path | None, typer.Option(help="A .html page with plots, or .md; without it: Markdown.")
    ] = None,
) -> None:
    """Make a page of an evaluation: tables, quality against bytes, needles by length and depth."""
    from kvpress.bench.quality import report as pages
    from kvpress.bench.quality.results import ResultsError, load

    made = load(results)
    if out is None:
        sys.stdout.write(pages.markdown(made))
        return
    if out.suffix not in (".html", ".md"):
        raise ResultsError(f"--out {out}: the name must end in .html or .md.")
    text = pages.page(made) if out.suffix == ".html" else pages.markdown(made)
    write(out, text.encode())


def plot(
    results: Annotated[Path, typer.Argument(help="A file that `kvpress eval --out` made.")],
    out: Annotated[Path, typer.Option(help="A .png, .svg or .pdf.")] = Path("quality.png"),
    what: Annotated[str, typer.Option(help="quality (against bytes) or needles.")] = "quality",
) -> None:
    """Draw an evaluation."""
    import io

    from kvpress.bench.plot import PlotError
    from kvpress.bench.quality import plots, table
    from kvpress.bench.quality.results import load

    made = load(results)
    if what not in ("quality", "needles"):
        raise PlotError(f"--what {what} is unknown; allowed: quality, needles.")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise PlotError(f"--out {out}: the name must end in .png, .svg or .pdf.")
    chosen = list(table.blocks(made))
    figure = plots.needles(made) if what == "needles" else plots.quality(chosen) if chosen else None
    if figure is None:
        raise PlotError(f"{results} holds nothing to draw for --what {what}. Evaluate that first.")
    picture = io.BytesIO()
    figure.savefig(picture, format=out.suffix[1:])
    write(out, picture.getvalue())


def write(path: Path, content: bytes) -> None:
    """Writes a file and says so. Raises ResultsError."""
    from kvpress.bench.quality.results import ResultsError

    try:
        path.write_bytes(content)
    except OSError as error:
        raise ResultsError(f"{path} cannot be written: {error}. Give another file.") from error
    console.print(f"Wrote {path}.", highlight=False)
