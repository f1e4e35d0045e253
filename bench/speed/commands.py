"""The command line of the speed benchmarks: `kvpress bench decode`, `prefill` and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from kvpress.bench.common.models import DTYPES, Source
from kvpress.bench.speed import options
from rich.console import Console

from kvpress.report.tables import Fitted

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
    dtype: options.Dtype = None,
    cache_dtype: options.CacheDtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    with_eval: options.WithEval = False,
    out: options.Out = None,
) -> None:
    """Time decode steps after long prompts, beside transformers' DynamicCache with SDPA.

    Each round decodes one token with every candidate.
    """
    source = Source(model, dtype, device, device_map, revision, trust_remote_code)
    setting = make_setting(source, cache_dtype, threads, rounds, warmup)
    _run("decode", setting, policy or POLICIES, budget, tokens or [8000], batch, with_eval, out)


def prefill(
    model: options.Model = "demo",
    policy: options.Policies = None,
    budget: options.Budgets = None,
    tokens: options.Lengths = None,
    batch: options.Batches = None,
    rounds: options.Rounds = 7,
    warmup: options.Warmup = 1,
    dtype: options.Dtype = None,
    cache_dtype: options.CacheDtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    with_eval: options.WithEval = False,
    out: options.Out = None,
) -> None:
    """Time the first token of long prompts, beside transformers' DynamicCache with SDPA.

    Each round reads the prompts once with every candidate, each time into an empty cache. The
    engine's ledger adds what attention, scoring, selection and storing took.
    """
    source = Source(model, dtype, device, device_map, revision, trust_remote_code)
    setting = make_setting(source, cache_dtype, threads, rounds, warmup)
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
    dtype: options.Dtype = None,
    cache_dtype: options.CacheDtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    with_eval: options.WithEval = False,
    out: options.Out = None,
) -> None:
    """Time whole generations of a batch of prompts, beside transformers' DynamicCache with SDPA."""
    source = Source(model, dtype, device, device_map, revision, trust_remote_code)
    setting = make_setting(source, cache_dtype, threads, rounds, warmup)
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
    dtype: options.Dtype = None,
    cache_dtype: options.CacheDtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    with_eval: options.WithEval = False,
    out: options.Out = None,
) -> None:
    """Measure peak and held bytes, each candidate in a process of its own."""
    source = Source(model, dtype, device, device_map, revision, trust_remote_code)
    setting = make_setting(source, cache_dtype, threads, rounds=1, warmup=0)
    setting = replace(setting, cap=None if cap is None else _bytes(cap))
    _run("memory", setting, policy or POLICIES, budget, tokens or [4000], batch, with_eval, out)


def overhead(
    model: Annotated[str, typer.Option(help="demo, a Hugging Face id, or a path.")] = "demo",
    policy: Annotated[list[str] | None, typer.Option(help="Repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of all layers.", min=1)] = 1000,
) -> None:
    """Time what the engine itself costs per layer and decode step, with a cache of one slot."""
    from kvpress.bench.common import models
    from kvpress.bench.speed import overhead as costs
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
    console.print(Fitted(table))


def make_setting(
    source: Source, cache_dtype: str | None, threads: int | None, rounds: int, warmup: int
) -> Setting:
    """Checks the names and sets the threads. Raises ModelError."""
    import torch
    from kvpress.bench.common.options import chosen_device
    from kvpress.bench.speed.setting import Setting

    if cache_dtype is not None and cache_dtype not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise typer.BadParameter(f"--cache-dtype {cache_dtype}: allowed: {allowed}.")
    if threads:
        torch.set_num_threads(threads)
    device = chosen_device(source.device).type
    if source.device_map is None:
        source = replace(source, device=device)
    return Setting(
        model=source.name,
        dtype=source.dtype_name,
        storage=cache_dtype,
        device=device,
        device_map=source.device_map,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        threads=torch.get_num_threads(),
        rounds=rounds,
        warmup=warmup,
    )


def _bytes(text: str) -> int:
    from kvpress.policy.budget import Budget

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
    from kvpress.bench.common.candidates import BASELINE
    from kvpress.bench.speed import benches, grid, rows, run, scores

    names = [BASELINE, *dict.fromkeys(options.with_budgets(policies, budgets or ()))]
    cells = grid.cells(name, lengths, batches or [1])
    made = run.run(setting, cells, names, scores.QualityOptions() if with_eval else None, out)
    for sheet in benches.sheets_of(made):
        console.print(Fitted(rows.table(sheet)))
    console.print(benches.BENCHES[name].LEGEND)
