"""The command line of the measurements: `kvpress bench ops`, `decode`, `prefill`, `overhead`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

bench = typer.Typer(help="Measure the operators and the engine.", no_args_is_help=True)
console = Console()


@bench.command()
def ops(
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name contains this; repeatable.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 9,
    warmup: Annotated[int, typer.Option(help="Rounds that are not timed.", min=0)] = 2,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: a GPU if there is one)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A PNG file for a bar plot.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny shapes: does everything run?")] = False,
    long: Annotated[bool, typer.Option(help="Also prompts of 8,192 tokens.")] = False,
) -> None:
    """Check the operators against their references, then time them beside their rivals.

    Each round runs every candidate of a case once. The probe is a plain read of the bytes that the
    operator must move, or a matrix product of as many operations. Operators whose results are wrong
    are not timed.
    """
    import torch
    from kvpress.bench import operators, progress, record, registry
    from kvpress.bench import plot as plots

    where = chosen_device(device)
    for option, path in (("--out", out), ("--plot", plot)):
        check_writable(option, path)
    if plot is not None:
        plots.require()
    chosen = registry.select(operators.cases(quick=quick, long=long), case or [])
    if threads:
        torch.set_num_threads(threads)
    facts = record.environment(where)
    outcomes = progress.time_cases(chosen, where, rounds, warmup)
    console.print(record.table(outcomes, facts))
    settings = {"rounds": rounds, "warmup": warmup, "quick": quick, "long": long}
    results = record.to_record(outcomes, facts, settings)
    if out is not None:
        record.write_json(out, results)
    if plot is not None:
        plots.plot(results, plot)
    if any(outcome.refused is not None for outcome in outcomes):
        raise typer.Exit(1)


@bench.command()
def decode(
    model: Annotated[str, typer.Option(help="demo, a Hugging Face id, or a path.")] = "demo",
    policy: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=64)] = 8000,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of one token.", min=1)] = 9,
    warmup: Annotated[int, typer.Option(help="Rounds that are not timed.", min=0)] = 2,
    cache_dtype: Annotated[str | None, typer.Option(help="Storage of keys and values.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
) -> None:
    """Time decode steps after a long prompt, beside transformers' DynamicCache with SDPA."""
    from kvpress.bench import candidates, models, progress
    from kvpress.bench import decode as decoding

    policies, storage = policy or decoding.POLICIES, _cache_dtype(cache_dtype)
    _check(policies, out)
    loaded, tokenizer = models.load(model)
    ids = candidates.prompt_ids(loaded, tokenizer, tokens, rounds + warmup)
    rows = progress.time_decode(loaded, ids, policies, batch or [1], rounds, warmup, storage)
    console.print(decoding.table(rows))
    settings = {"rounds": rounds, "warmup": warmup, "cache_dtype": cache_dtype}
    _write_rows(out, loaded.device, settings, [row.to_dict() for row in rows])


@bench.command()
def prefill(
    model: Annotated[str, typer.Option(help="demo, a Hugging Face id, or a path.")] = "demo",
    policy: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=64)] = 8000,
    rounds: Annotated[int, typer.Option(help="Timed rounds of the whole prompt.", min=1)] = 7,
    warmup: Annotated[int, typer.Option(help="Rounds that are not timed.", min=0)] = 1,
    cache_dtype: Annotated[str | None, typer.Option(help="Storage of keys and values.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: a GPU if there is one)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the results.")] = None,
) -> None:
    """Time the first token of a long prompt, beside transformers' DynamicCache with SDPA.

    Each round reads the prompt once with every candidate, each time into an empty cache. The
    engine's ledger adds what attention, scoring, selection and storing took.
    """
    from kvpress.bench import candidates, models, progress
    from kvpress.bench import prefill as prefilling

    where, storage = chosen_device(device), _cache_dtype(cache_dtype)
    policies = policy or prefilling.POLICIES
    _check(policies, out)
    loaded, tokenizer = models.load(model, device=where.type)
    ids = candidates.prompt_ids(loaded, tokenizer, tokens, new_tokens=1)
    rows = progress.time_prefill(loaded, ids, policies, rounds, warmup, storage)
    console.print(prefilling.table(rows))
    settings = {"model": model, "rounds": rounds, "warmup": warmup, "cache_dtype": cache_dtype}
    _write_rows(out, where, settings, prefilling.to_dicts(rows))


@bench.command()
def overhead(
    model: Annotated[str, typer.Option(help="demo, a Hugging Face id, or a path.")] = "demo",
    policy: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of all layers.", min=1)] = 1000,
) -> None:
    """Time what the engine itself costs per layer and decode step, with a cache of one slot."""
    from kvpress.bench import models
    from kvpress.bench import overhead as costs
    from rich.table import Table

    loaded, _ = models.load(model)
    chosen = policy or ["streaming_llm:budget=1,sink=0", "h2o:budget=1", "keyformer:budget=1"]
    table = Table(title="Per layer and decode step", title_justify="left")
    for title in ("policy", "median µs", "quartiles µs", "low–high µs"):
        table.add_column(title, justify="left" if title == "policy" else "right")
    for name, taken in costs.measure(loaded, chosen, rounds, warmup=20).items():
        ranges = taken.quartiles, (taken.low, taken.high)
        spreads = (f"{a * 1e6:.1f}–{b * 1e6:.1f}" for a, b in ranges)
        table.add_row(name, f"{taken.median * 1e6:.1f}", *spreads)
    console.print(table)


def chosen_device(name: str | None) -> Any:
    """The torch.device of an option; without one a GPU if there is one. Raises BadParameter."""
    import torch

    found = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"--device {name} is unknown; allowed: cpu, cuda.")
    if name == "cuda" and not found:
        raise typer.BadParameter("--device cuda: torch sees no CUDA device; use --device cpu.")
    return torch.device(name or ("cuda" if found else "cpu"))


def check_writable(option: str, path: Path | None) -> None:
    """Refuses a file whose folder is not there before a long run, not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(
            f"{option} {path}: it must be a file in a folder that exists. Make the folder first."
        )


def _check(policies: Sequence[str], out: Path | None) -> None:
    """Refuses a wrong policy or file before a model is loaded."""
    from kvpress.loading import parse

    for policy in policies:
        parse(policy)
    check_writable("--out", out)


def _cache_dtype(name: str | None) -> Any:
    from kvpress.bench import models

    if name is not None and name not in models.DTYPES:
        raise typer.BadParameter(f"--cache-dtype {name}: allowed: {list(models.DTYPES)}.")
    return None if name is None else models.DTYPES[name]


def _write_rows(
    out: Path | None, device: Any, settings: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    import torch
    from kvpress.bench import record

    if out is None:
        return
    facts = record.environment(torch.device(device.type))
    results = {"format": record.FORMAT, "environment": facts, "settings": settings}
    record.write_json(out, {**results, "rows": rows})
