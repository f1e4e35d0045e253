"""The command line of plans: `kvpress plan`, and `kvpress bench plan`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import AsJson, HubOptions, use_threads
from rich.console import Console

if TYPE_CHECKING:
    from kvpress.bench.common.journal import Row
    from kvpress.bench.common.models import Source

    from kvpress.pipe.plan.fit import Asked

console, errors = Console(), Console(stderr=True)
SIZES = ["1150MiB", "1250MiB", "1400MiB", "2GiB", "3GiB"]
LENGTHS, BATCHES = [2000], [1]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned for."""

    memory: Annotated[
        str, typer.Option(help="All that the process (on a GPU: the device) may hold: 8GiB.")
    ]
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a sequence, decoded ones included.",
            show_default="the longest that the model takes",
            min=2,
        ),
    ] = None
    batch: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 1
    new_tokens: Annotated[
        int | None, typer.Option(help="Of them, decoded.", show_default="256", min=1)
    ] = None
    host: Annotated[
        str | None, typer.Option(help="Bytes of the host for tiers.", show_default="none")
    ] = None
    disk: Annotated[
        str | None,
        typer.Option(help="Bytes of a disk for tiers: 20GiB:folder.", show_default="none"),
    ] = None


@command("kvpress plan --model demo --memory 2GiB --length 16000 --batch 4 --host 8GiB")
def plan(
    loading: HubOptions,
    wanted: PlanOptions,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="name:key=value,… ; repeat.", show_default="those that attach tries"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file for the plan.", show_default="none")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what fits in a memory, before anything is loaded but the model's config.

    Policies stand in the order of the harm that they do; the first that fits is what
    kvpress.attach(model, memory=…) takes. Bytes are counted by the functions of the cache itself.
    """
    from kvpress.bench.common.output import check_writable, write_json
    from kvpress.bench.common.report import table
    from kvpress.bench.plan.table import LEGEND, sheet, thresholds

    from kvpress.formulas.sizes import readable
    from kvpress.hf.planning import rungs_of
    from kvpress.pipe.plan.fit import fit
    from kvpress.pipe.plan.plan import plain

    check_writable("--out", out)
    given: list[str | None] = [*policy] if policy else [None]
    rungs = [rung for spec in given for rung in rungs_of(spec)]
    asked, weights = _asked(loading.source, wanted)
    tried = [(rung, fit(asked, rung)) for rung in rungs]
    chosen = next((found for _, found in tried if found.fits), None)
    record = {
        "model": asked.shape.name,
        "memory": asked.memory._asdict(),
        "texts": asked.texts._asdict(),
        "chosen": None if chosen is None else plain(chosen),
        "fits": [plain(found) for _, found in tried],
    }
    if out is not None:
        write_json(out, record)
    if as_json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
        return
    base = f"{readable(asked.memory.base)} of it are there before the first token"
    title = f"{asked.shape.name}, {asked.texts}, in {readable(asked.memory.given)}: {base}"
    console.print(table(sheet(asked, tried, title)))
    console.print(LEGEND, thresholds(asked, weights), sep="\n", highlight=False)
    if chosen is None:
        _refuse(asked, rungs)


def _refuse(asked: Asked, rungs: list[Any]) -> None:
    """Ends with the error that `attach` would raise."""
    from kvpress.pipe.plan.choose import choose

    choose(asked, rungs)


def _asked(source: Source, wanted: PlanOptions) -> tuple[Asked, int]:
    """What is asked, of a model of which there is nothing but its shape, and its weights' bytes."""
    from kvpress.bench.plan.model import described

    from kvpress.hf.planning import memory_of, texts_of
    from kvpress.pipe.plan.fit import Asked

    memory = memory_of(wanted.memory, wanted.host, wanted.disk)
    with errors.status(f"Reading the config of {source.name} …"):
        found = described(source)
    texts = texts_of(found.config, wanted.length, wanted.batch, wanted.new_tokens)
    memory = memory._replace(base=found.weights + found.process)
    return Asked(found.shape, texts, memory), found.weights


@command("kvpress bench plan --memory 1400MiB --memory 2GiB --length 2000 --batch 1 --batch 8")
def peaks(
    loading: HubOptions,
    memory: Annotated[list[str], typer.Option(help="Repeat for several.")] = SIZES,
    length: Annotated[list[int], typer.Option(help="Tokens; repeat for several.")] = LENGTHS,
    batch: Annotated[list[int], typer.Option(help="Sequences; repeat for several.")] = BATCHES,
    new_tokens: Annotated[int, typer.Option(help="Of the tokens, decoded.", min=1)] = 16,
    host: Annotated[
        str | None, typer.Option(help="Bytes of the host for tiers.", show_default="none")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON lines, gone on with where they exist.", show_default="none"),
    ] = None,
) -> None:
    """Measure the peak of processes of their own that attach with memory= and read as much."""
    from itertools import product

    import torch
    from kvpress.bench.common.journal import Journal
    from kvpress.bench.common.report import table
    from kvpress.bench.plan import record

    use_threads(loading.threads)
    journal = Journal(out)
    rows: list[Row] = []
    tiers = {} if host is None else {"host": host}
    for tokens, sequences, size in product(length, batch, memory):
        texts = {"length": tokens, "batch": sequences, "new_tokens": new_tokens}
        asked = {"memory": size, **texts, **tiers}
        with errors.status(f"{tokens:,} tokens × {sequences} in {size} …"):
            rows.append(record.row(journal, loading.source, asked, torch.get_num_threads()))
    console.print(table(record.sheet(rows)))
    console.print(record.LEGEND, highlight=False)
