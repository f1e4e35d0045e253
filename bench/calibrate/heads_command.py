"""The command line of `kvpress calibrate heads`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import ModelOptions, use_threads
from kvpress.bench.common.output import say_if_nothing_was_measured
from rich.console import Console
from rich.progress import Progress

from kvpress.report.tables import Fitted, new_table

console, errors = Console(), Console(stderr=True)
KIND, QUERY = "heads", "query_LND"


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What is read."""

    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text; repeatable.", show_default="prose, code and records that ship"),
    ] = None
    tokens: Annotated[int, typer.Option(help="Tokens of each text, at most.", min=256)] = 1280
    seed: Annotated[int, typer.Option(help="Of the records that are made.", min=0)] = 0


@command("kvpress calibrate heads --out demo-heads.safetensors")
def heads(
    wanted: TextOptions,
    loading: ModelOptions,
    out: Annotated[
        Path, typer.Option(help="The file; an interrupted calibration goes on from it.")
    ] = Path("heads.safetensors"),
) -> None:
    """Find how many slots every layer and head needs, and what predicts which ones.

    The model repeats each text; what that attends to are the scores. Use the file with
    `heads:calibration=FILE` beside any policy that scores, with `zap:calibration=FILE`, and with
    `triattention:calibration=FILE`.
    """
    from kvpress.bench.calibrate import texts

    use_threads(loading.threads)
    with errors.status(f"Loading {loading.model} …"):
        loaded, tokenizer = loading.source.load()
    read = texts.texts(wanted.text, wanted.seed)
    settings = {"texts": [text.to_dict() for text in read], "tokens": wanted.tokens}
    found = begin(out, loaded, settings)
    if found.finished and QUERY in found.tensors:
        show(found.tensors["share_LHX"], out)
        say_if_nothing_was_measured(out, measured=0)
        return
    ids = [texts.ids(loaded, tokenizer, text, wanted.tokens) for text in read]
    found = look(loaded, tokenizer, ids, found, out)
    show(finish(loaded, tokenizer, ids, found, out).tensors["share_LHX"], out)


def begin(out: Path, model: Any, settings: dict[str, Any]) -> Any:
    """What is in a file, if it is of the same texts; otherwise nothing.

    Raises PolicyError for a file of other texts or another model.
    """
    from kvpress.errors import PolicyError
    from kvpress.hf import learned

    if not out.exists():
        return learned.Learned({}, settings)
    known = learned.read(out, model, KIND)
    if known.settings != settings:
        raise PolicyError(
            f"{out} holds a calibration with {known.settings}, not with {settings}. Give another"
            " --out, or delete it."
        )
    return known


def look(model: Any, tokenizer: Any, ids: list[Any], found: Any, out: Path) -> Any:
    """Scores the texts that were not scored yet, and writes what is known after each."""
    from kvpress.bench.calibrate.heads import scores

    from kvpress.hf import learned

    with Progress(console=errors) as progress:
        task = progress.add_task("texts", total=len(ids), completed=found.done)
        for number in range(found.done, len(ids)):
            tensors = {**found.tensors, f"score_{number}": scores(model, tokenizer, ids[number])}
            found = found._replace(tensors=tensors, done=number + 1)
            learned.write(out, model, KIND, found)
            progress.update(task, completed=found.done)
    return found


def finish(model: Any, tokenizer: Any, ids: list[Any], found: Any, out: Path) -> Any:
    """Makes of the scores of all texts what policies read, and writes that instead of them."""
    from kvpress.hf import learned

    if not found.finished:  # files of earlier versions know nothing of queries alone
        found = found._replace(tensors=_found(model, tokenizer, ids, found), finished=True)
    found = found._replace(tensors=found.tensors | _queries(model, tokenizer, ids))
    learned.write(out, model, KIND, found)
    return found


def _found(model: Any, tokenizer: Any, ids: list[Any], found: Any) -> dict[str, Any]:
    """Shares and regressions, of the scores of all texts."""
    import torch
    from kvpress.bench.calibrate.heads import regressions

    from kvpress.errors import UnsupportedModelError
    from kvpress.formulas.shares import curves

    known = [found.tensors[f"score_{number}"] for number in range(len(ids))]
    made = {"share_LHX": torch.stack([curves(score) for score in known]).mean(0).float()}
    try:
        with errors.status("Finding what predicts them …"):
            made["ridge_LXH"] = regressions(model, tokenizer, ids, known).float()
    except UnsupportedModelError as error:
        errors.print(f"Without predictions from keys and values: {error}")
    return made


def _queries(model: Any, tokenizer: Any, ids: list[Any]) -> dict[str, Any]:
    """What queries are on average."""
    from kvpress.bench.calibrate.heads import queries

    from kvpress.errors import UnsupportedModelError

    try:
        with errors.status("Finding what queries are on average …"):
            return dict(zip((QUERY, "length_LNF"), queries(model, tokenizer, ids), strict=True))
    except UnsupportedModelError as error:
        errors.print(f"Without what queries are on average: {error}")
        return {}


def show(share_LHX: Any, out: Path) -> None:
    """Prints how many rows keep how much of a quarter."""
    from kvpress.formulas.shares import at

    share = at(share_LHX, 0.25).flatten()
    bounds = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 1.01)
    table = new_table((), ("of its tokens", "rows"), "What rows keep of a budget of 0.25")
    for low, high in pairwise(bounds):
        count = int(((share >= low) & (share < high)).sum())
        table.add_row(f"{low:.0%} to {min(high, 1):.0%}", str(count))
    console.print(Fitted(table))
    console.print(f"{len(share)} rows. Written to {out}.")
