"""The command line of serving: `kvpress bench serving`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import AsJson, ModelOptions, use_threads
from rich.console import Console

if TYPE_CHECKING:
    from kvpress.bench.serving.measure import Setting

console, errors = Console(), Console(stderr=True)
_BATCHED = ["full", "keyformer:budget=0.25"]


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """What arrives, and who serves it."""

    policy: Annotated[
        list[str] | None,
        typer.Option(help="name:key=value,… ; repeatable.", show_default=" and ".join(_BATCHED)),
    ] = None
    requests: Annotated[int, typer.Option(help="How many arrive.", min=1)] = 32
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt, least:most, evenly spread.")] = (
        "200:2000"
    )
    new: Annotated[str, typer.Option(help="Tokens that are drawn, least:most.")] = "32:96"
    rate: Annotated[
        float, typer.Option(help="Arrivals per second, by chance; 0: all at once.", min=0)
    ] = 2.0
    seed: Annotated[int, typer.Option(help="Of lengths and arrivals.")] = 0
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 3
    warmup: Annotated[
        int, typer.Option(help="Rounds that are not timed; two requests always are.", min=0)
    ] = 0
    chunk: Annotated[
        int, typer.Option(help="Tokens of a prompt that the engine reads at once.", min=1)
    ] = 512
    most_running: Annotated[int, typer.Option(help="Requests served at once.", min=1)] = 64
    theirs: Annotated[bool, typer.Option(help="Also transformers' continuous batching.")] = True
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a pass of transformers' batching.", min=1)
    ] = 512
    cap: Annotated[
        list[str] | None,
        typer.Option(
            help="Also serve all requests at once with so many bytes, 256MiB; repeatable.",
            show_default="none",
        ),
    ] = None


@command("kvpress bench serving --requests 8 --prompt 200:500 --new 16:32 --cap 64MiB")
def serving(
    loading: ModelOptions,
    asked: ServingOptions,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file for the results.", show_default="none")
    ] = None,
) -> None:
    """Serve many requests: one by one, batched, and by transformers' batching, in turn.

    All draw the likeliest tokens for the same prompts, which arrive by the same schedule; no token
    ends a text. Every policy is served one by one, by engine.generate, and by the batcher.
    """
    from kvpress.bench.common.environment import environment
    from kvpress.bench.common.output import check_writable, write_json
    from kvpress.bench.common.report import table
    from kvpress.bench.serving import measure, report

    check_writable("--out", out)
    use_threads(loading.threads)
    setting = _setting(loading, asked)
    with errors.status(f"Loading {loading.model} …"):
        model, tokenizer = setting.source.load()
    with errors.status("Serving …") as said:

        def on_round(number: int) -> None:
            said.update(f"Serving: {number + 1} of {setting.warmup + setting.rounds} rounds …")

        rows = measure.measure(setting, model, tokenizer, on_round)
        said.update("Serving under caps …")
        caps = measure.capped(setting, model, tokenizer)
    record = report.to_record(rows, caps, environment(model.device), setting.to_dict())
    if as_json:
        console.print_json(data=record)
    else:
        for sheet in report.sheets(record):
            console.print(table(sheet))
        console.print(report.LEGEND)
    if out is not None:
        write_json(out, record)


def _setting(loading: ModelOptions, asked: ServingOptions) -> Setting:
    """What was asked for; refused before a model is loaded where it cannot be run."""
    import torch
    from kvpress.bench.serving.measure import Setting
    from kvpress.bench.serving.workload import Load

    from kvpress.policy.loading import parse
    from kvpress.store.tiers.caps import Caps

    policies, caps = tuple(asked.policy or _BATCHED), tuple(asked.cap or ())
    for policy in policies:
        parse(policy)
    for cap in caps:
        Caps.parse(cap, None, None)
    return Setting(
        source=loading.source,
        policies=policies,
        load=Load(
            requests=asked.requests,
            prompt=_ends("--prompt", asked.prompt),
            new=_ends("--new", asked.new),
            rate=asked.rate,
            seed=asked.seed,
        ),
        rounds=asked.rounds,
        warmup=asked.warmup,
        chunk=asked.chunk,
        running=asked.most_running,
        batch_tokens=asked.batch_tokens,
        theirs=asked.theirs,
        caps=caps,
        threads=torch.get_num_threads(),
    )


def _ends(option: str, given: str) -> tuple[int, int]:
    """Two numbers of `200:2000`, or one twice. Raises BadParameter."""
    parts: list[Any] = given.split(":")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise typer.BadParameter(
            f"{option} {given}: least:most tokens, such as 200:2000, or one number for all."
        )
    return int(parts[0]), int(parts[-1])
