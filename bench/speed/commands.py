"""The command line of the speed benchmarks: `kvpress bench decode`, `prefill` and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from kvpress.bench.speed import options
from rich.console import Console

if TYPE_CHECKING:
    from kvpress.bench.speed.setting import Setting

console = Console()
POLICIES = ("full", "keyformer:budget=0.5", "keyformer:budget=0.2")
PREFILL_POLICIES = ("full", "keyformer:budget=0.5", "snapkv:budget=0.5,window=64")


def decode(
    model: options.Model = "demo",
    policy: options.Policies = None,
    budget: options.Budgets = None,
    tokens: options.Lengths = None,
    batch: options.Batches = None,
    rounds: options.Rounds = 25,
    warmup: options.Warmup = 2,
    dtype: options.Dtype = "float32",
    cache_dtype: options.CacheDtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    with_eval: options.WithEval = False,
    out: options.Out = None,
) -> None:
    """Time decode steps after long prompts, beside transformers' DynamicCache with SDPA.

    Each round decodes one token with every candidate.
    """
    setting = make_setting(model, dtype, cache_dtype, device, threads, rounds, warmup)
    _run("decode", setting, policy or POLICIES, budget, tokens or [8000], batch, with_eval, out)


def prefill(
    model: options.Model = "demo",
    policy: options.Policies = None,
    budget: options.Budgets = None,
    tokens: options.Lengths = None,
    batch: options.Batches = None,
    rounds: options.Rounds = 7,
    warmup: options.Warmup = 1,
    dtype: options.Dtype = "float32",
    cache_dtype: options.CacheDtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    with_eval: options.WithEval = False,
    out: options.Out = None,
) -> None:
    """Time the first token of long prompts, beside transformers' DynamicCache with SDPA.

    Each round reads the prompts once with every candidate, each time into an empty cache. The
    engine's ledger adds what attention, scoring, selection and storing took.
    """
    setting = make_setting(model, dtype, cache_dtype, device, threads, rounds, warmup)
    names = policy or PREFILL_POLICIES
    _run("prefill", setting, names, budget, tokens or [8000], batch, with_eval, out)


def throughput(
    model: options.Model = "demo",
    policy: options.Policies = None,
    budget: options.Budgets = None,
    tokens: options.Lengths = None,
    batch: options.Batches = None,
    new_tokens: Annotated[int, typer.Option(help="Generated per sequence.", min=2)] = 64,
    rounds: options.Rounds = 5,
    warmup: options.Warmup = 1,
    dtype: options.Dtype = "float32",
    cache_dtype: options.CacheDtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    with_eval: options.WithEval = False,
    out: options.Out = None,
) -> None:
    """Time whole generations of a batch of prompts, beside transformers' DynamicCache with SDPA."""
    setting = make_setting(model, dtype, cache_dtype, device, threads, rounds, warmup)
    setting = replace(setting, new_tokens=new_tokens)
    batches = batch or [4]
    names = policy or POLICIES
    _run("throughput", setting, names, budget, tokens or [1000], batches, with_eval, out)


def memory(
    model: options.Model = "demo",
    policy: options.Policies = None,
    budget: options.Budgets = None,
    tokens: options.Lengths = None,
    batch: options.Batches = None,
    cap: Annotated[
        str | None, typer.Option(help="Bytes (8GiB): also the largest batch and context under it.")
    ] = None,
    dtype: options.Dtype = "float32",
    cache_dtype: options.CacheDtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    with_eval: options.WithEval = False,
    out: options.Out = None,
) -> None:
    """Measure peak and held bytes, each candidate in a process of its own."""
    setting = make_setting(model, dtype, cache_dtype, device, threads, rounds=1, warmup=0)
    setting = replace(setting, cap=None if cap is None else _bytes(cap))
    _run("memory", setting, policy or POLICIES, budget, tokens or [4000], batch, with_eval, out)


def make_setting(
    model: str,
    dtype: str,
    cache_dtype: str | None,
    device: str | None,
    threads: int | None,
    rounds: int,
    warmup: int,
) -> Setting:
    """Checks the names and sets the threads."""
    import torch
    from kvpress.bench import models
    from kvpress.bench.commands import chosen_device
    from kvpress.bench.speed.setting import Setting

    for option, name in (("--dtype", dtype), ("--cache-dtype", cache_dtype)):
        if name is not None and name not in models.DTYPES:
            raise typer.BadParameter(f"{option} {name}: allowed: {', '.join(models.DTYPES)}.")
    if threads:
        torch.set_num_threads(threads)
    return Setting(
        model=model,
        dtype=dtype,
        storage=cache_dtype,
        device=chosen_device(device).type,
        threads=torch.get_num_threads(),
        rounds=rounds,
        warmup=warmup,
    )


def _bytes(text: str) -> int:
    from kvpress.budget import Budget

    cap = Budget.parse(text)
    if cap.unit != "bytes":
        raise typer.BadParameter(f"--cap {text}: give bytes with a unit, such as 8GiB.")
    return int(cap.amount)


def _run(
    name: str,
    setting: Setting,
    policies: Sequence[str],
    budgets: Sequence[str] | None,
    lengths: Sequence[int],
    batches: Sequence[int] | None,
    with_eval: bool,
    out: Path | None,
) -> None:
    """Fills the grid and prints its tables."""
    from kvpress.bench.candidates import BASELINE
    from kvpress.bench.speed import benches, beside, grid, rows, run

    names = [BASELINE, *dict.fromkeys(options.with_budgets(policies, budgets or ()))]
    cells = grid.cells(name, lengths, batches or [1])
    made = run.run(setting, cells, names, beside.Asked() if with_eval else None, out)
    for sheet in benches.sheets_of(made):
        console.print(rows.table(sheet))
    console.print(benches.BENCHES[name].LEGEND)
