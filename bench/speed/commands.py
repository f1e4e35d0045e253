"""The command line of the speed benchmarks: `kvpress bench decode`, `prefill` and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.models import DTYPES
from kvpress.bench.common.options import (
    HubOptions,
    ModelOptions,
    TieredOptions,
    chosen_device,
    use_threads,
)
from kvpress.bench.common.ranks import ParallelOptions
from kvpress.bench.shards.options import RayOptions
from kvpress.bench.speed import options
from rich.console import Console

from kvpress.report.tables import Fitted, new_table

if TYPE_CHECKING:
    from kvpress.bench.common.journal import Row
    from kvpress.bench.speed.rows import Cell
    from kvpress.bench.speed.setting import Setting

console, errors = Console(), Console(stderr=True)
POLICIES = ["full", "keyformer:budget=0.5", "keyformer:budget=0.2"]
PREFILL_POLICIES = ["full", "keyformer:budget=0.5", "snapkv:budget=0.5,window=64"]
STEP_POLICIES = ["streaming_llm:budget=1,sink=0", "h2o:budget=1", "keyformer:budget=1"]
LONG, MIDDLE, SHORT = [8000], [4000], [1000]
ONE = ParallelOptions()
ALONE, TOGETHER = [1], [4]
LAYER_POLICIES = [
    "full",
    *("quest:read=2048", "quest:read=2048,cells=0", "leoam:read=2048", "leoam:read=2048,cells=0"),
    *("quest:read=2048,page=128", "quest:read=2048,cells=0,page=128"),
    "leoam:read=2048,cells=0,page=128",
]
CASES = {"model": (POLICIES, LONG), "one-layer": (LAYER_POLICIES, [32_768])}


@command("kvpress bench decode --tokens 2000 --policy full --policy quest:read=256")
def decode(
    grid: options.GridOptions,
    loading: TieredOptions,
    parts: ParallelOptions,
    sharing: RayOptions,
    case: Annotated[str, typer.Option(help="model, or one-layer.")] = "model",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="name:key=value,… ; repeatable.",
            show_default=f"{', '.join(POLICIES)}; of one layer {', '.join(LAYER_POLICIES)}",
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Of a prompt; repeatable.", show_default="8000, of one layer 32768", min=64
        ),
    ] = None,
    batch: options.Batches = ALONE,
    rounds: options.Rounds = 25,
    warmup: options.Warmup = 2,
    baseline: options.Baselines = None,
) -> None:
    """Time decode steps after long prompts, beside transformers' caches with SDPA.

    Each round decodes one token with every candidate. With --case one-layer a layer of 8 KV heads,
    each of 4 query heads and 128 channels in bfloat16, attends alone: steps that read some pages
    only beside one that reads everything, and the share of them that the selection takes.
    """
    if case not in CASES:
        raise typer.BadParameter(f"--case {case} is unknown; allowed: {', '.join(CASES)}.")
    if case == "one-layer" and (batch != ALONE or grid.with_eval or loading.caps or baseline):
        raise typer.BadParameter(
            "--case one-layer times one sequence on the device: leave out --batch, --with-eval,"
            " --baseline and caps. kvpress bench tiers --case one-layer has caps."
        )
    usual_policies, usual_tokens = CASES[case]
    setting = partial(make_setting, loading, grid.cache_dtype, rounds, warmup, parts)
    name = "decode" if case == "model" else "layer"
    shown = policy or usual_policies, tokens or usual_tokens, batch
    actors = sharing.over(parts)
    rivals = None
    if case == "model":
        rivals = options.baselines(name, baseline, loading, actors is None and parts.tp is None)
    _run(name, setting, grid, *shown, actors, rivals)


@command("kvpress bench prefill --tokens 2000 --policy full --policy snapkv:budget=0.2")
def prefill(
    grid: options.GridOptions,
    loading: ModelOptions,
    parts: ParallelOptions,
    sharing: RayOptions,
    policy: options.Policies = PREFILL_POLICIES,
    tokens: options.Lengths = LONG,
    batch: options.Batches = ALONE,
    rounds: options.Rounds = 7,
    warmup: options.Warmup = 1,
) -> None:
    """Time the first token of long prompts, beside transformers' DynamicCache with SDPA.

    Each round reads the prompts once with every candidate, each time into an empty cache. The
    engine's ledger adds what attention, scoring, selection and storing took.
    """
    setting = partial(make_setting, loading, grid.cache_dtype, rounds, warmup, parts)
    _run("prefill", setting, grid, policy, tokens, batch, sharing.over(parts))


@command("kvpress bench throughput --batch 8 --new-tokens 32")
def throughput(
    grid: options.GridOptions,
    loading: TieredOptions,
    parts: ParallelOptions,
    sharing: RayOptions,
    policy: options.Policies = POLICIES,
    tokens: options.Lengths = SHORT,
    batch: options.Batches = TOGETHER,
    new_tokens: Annotated[int, typer.Option(help="Generated per sequence.", min=2)] = 64,
    rounds: options.Rounds = 5,
    warmup: options.Warmup = 1,
    baseline: options.Baselines = None,
) -> None:
    """Time whole generations of a batch of prompts, beside transformers' caches with SDPA."""
    actors = sharing.over(parts)
    alone = actors is None and parts.tp is None
    rivals = options.baselines("throughput", baseline, loading, alone)
    given = loading, grid.cache_dtype, rounds, warmup, parts
    setting = partial(make_setting, *given, new_tokens=new_tokens)
    _run("throughput", setting, grid, policy, tokens, batch, actors, rivals)


@command("kvpress bench memory --tokens 8000 --cap 4GiB")
def memory(
    grid: options.GridOptions,
    loading: ModelOptions,
    policy: options.Policies = POLICIES,
    tokens: options.Lengths = MIDDLE,
    batch: options.Batches = ALONE,
    cap: Annotated[
        str | None,
        typer.Option(
            help="Bytes (8GiB): also the largest batch and context under it.", show_default="none"
        ),
    ] = None,
) -> None:
    """Measure peak and held bytes, each candidate in a process of its own."""
    most = None if cap is None else _bytes(cap)
    setting = partial(make_setting, loading, grid.cache_dtype, rounds=1, warmup=0, cap=most)
    _run("memory", setting, grid, policy, tokens, batch)


@command("kvpress bench overhead --policy h2o:budget=1 --rounds 200")
def overhead(
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face id, or a path.")] = "demo",
    policy: options.Policies = STEP_POLICIES,
    rounds: Annotated[int, typer.Option(help="Timed steps of all layers.", min=1)] = 1000,
) -> None:
    """Time what the engine itself costs per layer and decode step, with a cache of one slot."""
    from kvpress.bench.common import models
    from kvpress.bench.speed import overhead as costs

    loaded, _ = models.load(model)
    numbers = ("median µs", "quartiles µs", "low–high µs")
    table = new_table(["policy"], numbers, "Per layer and decode step")
    for name, taken in costs.measure(loaded, policy, rounds, warmup=20).items():
        ranges = taken.quartiles, (taken.low, taken.high)
        spreads = (f"{a * 1e6:.1f}–{b * 1e6:.1f}" for a, b in ranges)
        table.add_row(name, f"{taken.median * 1e6:.1f}", *spreads)
    console.print(Fitted(table))


def make_setting(
    loading: HubOptions,
    cache_dtype: str | None,
    rounds: int,
    warmup: int,
    parts: ParallelOptions = ONE,
    **others: Any,
) -> Setting:
    """Checks the names and sets the threads. others: fields of the setting. Raises ModelError."""
    import torch
    from kvpress.bench.speed.setting import Setting

    if cache_dtype is not None and cache_dtype not in DTYPES:
        allowed = ", ".join(DTYPES)
        raise typer.BadParameter(f"--cache-dtype {cache_dtype}: allowed: {allowed}.")
    use_threads(loading.threads)
    caps = loading.caps if isinstance(loading, TieredOptions) else None
    source = parts.divided(loading.source)
    device = chosen_device(source.device).type
    if source.device_map is None and source.tp is None:
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
        caps=caps or None,
        tp=source.tp,
        **others,
    )


def _bytes(text: str) -> int:
    from kvpress.policy.budget import Budget

    cap = Budget.parse(text, "--cap")
    if cap.unit != "bytes":
        raise typer.BadParameter(f"--cap {text}: give bytes with a unit, such as 8GiB.")
    return int(cap.amount)


def _run(
    name: str,
    setting: partial[Setting],
    given: options.GridOptions,
    policies: Sequence[str],
    lengths: Sequence[int],
    batches: Sequence[int],
    actors: int | None = None,
    rivals: Sequence[str] | None = None,
) -> None:
    """Fills the grid and prints its tables. setting: made in the processes that measure.

    rivals: what the policies are compared with; None: transformers' DynamicCache.
    """
    from kvpress.bench.common import report
    from kvpress.bench.common.candidates import BASELINE
    from kvpress.bench.speed import benches, grid, layer, run, scores

    baseline = [] if name == layer.NAME else [BASELINE]
    names = [
        *(rivals or baseline),
        *dict.fromkeys(options.with_budgets(policies, given.budget or ())),
    ]
    cells = grid.cells(name, lengths, batches)
    if actors is not None:
        made = _run_shared(setting, cells, names, given, actors)
    else:
        quality = scores.QualityOptions() if given.with_eval else None
        made = run.run(setting(), cells, names, quality, given.out)
    for sheet in benches.sheets_of(made):
        console.print(report.table(sheet))
    console.print(benches.BENCHES[name].LEGEND)


def _run_shared(
    setting: partial[Setting],
    cells: Sequence[Cell],
    names: Sequence[str],
    given: options.GridOptions,
    actors: int,
) -> list[Row]:
    """The rows, from actors of Ray: no more of them than there are cells."""
    from kvpress.bench.common.output import check_writable
    from kvpress.bench.shards.teams import actors_of
    from kvpress.bench.speed import shared

    check_writable("--out", given.out)
    if given.with_eval:
        raise typer.BadParameter(
            "--with-eval cannot be used with --ray. Leave it out, and measure quality with"
            " kvpress eval --ray."
        )
    if actors > len(cells):
        said = (
            f"--ray {actors}: {len(cells)} actors run, one for each size; candidates of one size"
            " are timed side by side."
        )
        errors.print(said, highlight=False, soft_wrap=True)
    loading: HubOptions = setting.args[0]
    work = partial(shared.begun, setting, cells, names)
    count = min(actors, len(cells))
    with actors_of(count, loading.source, loading.threads, work) as team:
        return shared.run(team, names, given.out)
