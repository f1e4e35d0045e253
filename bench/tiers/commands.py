"""The command line of tiers: `kvpress bench tiers`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import TieredOptions, use_threads
from rich.console import Console

if TYPE_CHECKING:
    from kvpress.bench.common.journal import Row
    from kvpress.bench.tiers.setting import Setting

console, errors = Console(), Console(stderr=True)
CASES = {
    "model": {"tokens": 8000, "device": "0.2", "host": "0.4"},
    "one-layer": {"tokens": 128_000, "device": "64MiB", "host": "128MiB"},
}
_RECORD = 2**18  # bytes of a record of the disk probe where none was read


@dataclass(frozen=True, kw_only=True)
class TierBenchOptions:
    """What is measured, and how often."""

    case: Annotated[
        str, typer.Option(help="model, or one-layer: 8 KV heads of 128 channels in bfloat16.")
    ] = "model"
    policy: Annotated[
        list[str] | None,
        typer.Option(help="name:key=value,…; of --case model; repeat.", show_default="full"),
    ] = None
    tokens: Annotated[
        int | None,
        typer.Option(help="Of a prompt.", show_default="8000, of one layer 128000", min=64),
    ] = None
    batch: Annotated[int, typer.Option(help="Sequences together, of --case model.", min=1)] = 4
    steps: Annotated[int, typer.Option(help="Timed decode steps.", min=1)] = 15
    warmup: Annotated[int, typer.Option(help="Steps that are not timed.", min=0)] = 2
    memory_steps: Annotated[
        int, typer.Option(help="Decoded tokens of the process that measures memory.", min=1)
    ] = 64
    records: Annotated[
        int, typer.Option(help="Records that are read from the disk at a time.", min=16)
    ] = 512
    read: Annotated[
        int, typer.Option(help="Tokens of the text that one layer repeats.", min=16)
    ] = 2000
    compare: Annotated[
        bool, typer.Option(help="Also one layer without tiers, and all on the device.")
    ] = True

    @property
    def policies(self) -> tuple[str, ...]:
        """Those that are measured: everything is read where none is given."""
        return tuple(self.policy or ["full"])


@command("kvpress bench tiers --tokens 2000 --batch 2 --device 0.3 --host 0.3")
def tiers(
    loading: TieredOptions,
    asked: TierBenchOptions,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file for the results.", show_default="none")
    ] = None,
) -> None:
    """Time decode steps whose pages are in tiers, beside all of them on the device, in turn.

    Each step reads every page, unless policies such as leoam:read=0.2 choose them: then they stand
    beside exact streaming under the same caps. Also: what recomputing the prompts takes, the memory
    of a process of its own, and the disk's rate beside that of plain reads. Caps may be shares of
    the cache, as in --device 0.2; without any a fifth is on the device, two fifths on the host, and
    the rest on disk in a temporary folder; of one layer 64MiB and 128MiB.
    """
    from kvpress.bench.common.caps import check
    from kvpress.bench.common.output import check_writable, write_json
    from kvpress.bench.common.report import table
    from kvpress.bench.tiers import report

    from kvpress.policy.loading import parse

    if asked.case not in CASES:
        raise typer.BadParameter(f"--case {asked.case} is unknown; allowed: {', '.join(CASES)}.")
    for given in asked.policies:  # refuse a wrong policy, cap or file before a model is loaded
        parse(given)
    _check_alike(asked.policies)
    check_writable("--out", out)
    use_threads(loading.threads)
    with _setting(loading, asked) as setting:
        check({**setting.caps, "disk": f"{setting.caps['disk'] or '1GiB'}:{setting.folder}"})
        record = _measured(loading, asked, setting)
    for sheet in report.sheets(record):
        console.print(table(sheet))
    console.print(report.LEGEND)
    if out is not None:
        write_json(out, record)


def _check_alike(policies: Sequence[str]) -> None:
    """Raises BadParameter for policies that do not stand beside the same exact streaming."""
    from kvpress.bench.tiers.steps import exact_part

    exact = sorted({exact_part(policy) for policy in policies})
    if len(exact) > 1:
        raise typer.BadParameter(
            f"--policy {', '.join(policies)}: without choosing pages these are {', '.join(exact)};"
            " those of one run must be the same. Give each its own run."
        )


@contextmanager
def _setting(loading: TieredOptions, asked: TierBenchOptions) -> Iterator[Setting]:
    """Everything that a run has in common, and a folder for its files."""
    import torch
    from kvpress.bench.tiers.setting import Setting, folder_of

    usual: dict[str, Any] = CASES[asked.case]
    size, folder = folder_of(loading.disk)
    given = loading.given_caps
    caps = {name: given[name] or usual[name] for name in ("device", "host")}
    with tempfile.TemporaryDirectory(prefix="kvpress-") as own:
        yield Setting(
            source=loading.source,
            policies=asked.policies,
            tokens=asked.tokens or usual["tokens"],
            batch=asked.batch,
            caps={**caps, "disk": size},
            folder=str(folder or own),
            steps=asked.steps,
            warmup=asked.warmup,
            memory_steps=asked.memory_steps,
            threads=torch.get_num_threads(),
        )


def _measured(loading: TieredOptions, asked: TierBenchOptions, setting: Setting) -> dict[str, Any]:
    from kvpress.bench.common.environment import environment
    from kvpress.bench.tiers import report

    with errors.status(f"Loading {loading.model} …"):
        model, tokenizer = setting.source.load()
    facts, settings = environment(model.device), setting.to_dict()
    if asked.case == "one-layer":
        for name in ("policy", "batch", "memory_steps"):
            del settings[name]
        found = {"candidates": _one_layer(asked, setting, model, tokenizer)}
        return report.to_record(asked.case, found, facts, settings)
    return report.to_record(
        asked.case, _whole_model(asked, setting, model, tokenizer), facts, settings
    )


def _whole_model(
    asked: TierBenchOptions, setting: Setting, model: Any, tokenizer: Any
) -> dict[str, Any]:
    """Steps, then memory, then the disk: not at the same time."""
    from kvpress.bench.tiers import disk, memory, steps

    from kvpress.formulas.sizes import round_up
    from kvpress.store.tiers.extents import UNIT

    with errors.status("Reading the prompts, and decoding …"):
        rows = steps.measure(setting, model, tokenizer)
    with errors.status("Measuring memory …"):
        resident = memory.measure(setting)
    read = (rows[steps.CAPPED].get("tiers") or {}).get("ways", {}).get("disk to host", {})
    size = round_up(read["bytes"] // read["count"], UNIT) if read.get("count") else _RECORD
    with errors.status("Reading from the disk …"):
        probe = disk.Probe(asked.records, size, min(asked.steps, 5))
        found = disk.measure(Path(setting.folder), probe)
    return {"candidates": rows, "memory": resident, "disk": found}


def _one_layer(
    asked: TierBenchOptions, setting: Setting, model: Any, tokenizer: Any
) -> dict[str, Row]:
    import torch
    from kvpress.bench.sparse.tiled import Shape, tiles
    from kvpress.bench.tiers import one_layer

    shape = Shape(tokens=setting.tokens, read=asked.read)
    with errors.status("Reading the text …") as said, torch.inference_mode():
        made = tiles(model, tokenizer, shape)

        def on_chunk(tokens: int) -> None:
            said.update(f"{tokens:,} of {shape.tokens:,} tokens stored …")

        caps, counts = setting.sizes(shape.whole), (asked.steps, asked.warmup)
        return one_layer.measure(shape, made, caps, *counts, asked.compare, on_chunk)
