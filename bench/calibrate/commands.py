"""The command line of calibrations: `kvpress calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from kvpress.bench.calibrate.heads_command import heads
from kvpress.bench.common.command import command
from kvpress.bench.common.options import REFERENCE, ModelOptions, use_threads
from kvpress.bench.common.output import say_if_nothing_was_measured
from rich.console import Console
from rich.progress import Progress

from kvpress.report.tables import Fitted, new_table

console, errors = Console(), Console(stderr=True)
calibrate = typer.Typer(help="Find what a policy needs to know of a model.", no_args_is_help=True)


@calibrate.callback()
def _group() -> None:
    """Find what a policy needs to know of a model."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What is searched for, and on what."""

    text: Annotated[Path | None, typer.Option(help="A text to read.", show_default=REFERENCE)] = (
        None
    )
    tokens: Annotated[int, typer.Option(help="Tokens of a sample.", min=512)] = 8000
    samples: Annotated[int, typer.Option(help="Consecutive parts of the text.", min=1)] = 2
    error: Annotated[
        float, typer.Option(help="Bound of a head's error: Σ|o − o'| / Σ|o|.", min=1e-6)
    ] = 0.05
    absolute: Annotated[
        bool, typer.Option("--absolute", help="Bound Σ|o − o'| per token instead (the paper's).")
    ] = False
    first: Annotated[
        float, typer.Option(help="The threshold to begin with (paper: 0.008).", min=1e-4)
    ] = 0.064
    local: Annotated[int, typer.Option(help="Local area, in slots.", min=0)] = 128

    def settings(self, text: dict[str, str]) -> dict[str, Any]:
        """What tells searches apart. text: its name and hash."""
        return {
            "text": text,
            "tokens": self.tokens,
            "samples": self.samples,
            "error": self.error,
            "relative": not self.absolute,
            "first": self.first,
        }


@command("kvpress calibrate sale --tokens 2000 --samples 1 --out demo.safetensors")
def sale(
    wanted: SearchOptions,
    loading: ModelOptions,
    out: Annotated[
        Path, typer.Option(help="The file; an interrupted search goes on from it.")
    ] = Path("sale.safetensors"),
) -> None:
    """Find the thresholds of sparse prompt attention, and from which length on it pays.

    Every head gets the largest threshold of FIRST, FIRST / 2, … with which its output stays within
    the bound on all samples, or 0: dense. Use the file with `sale:calibration=FILE`.
    """
    from kvpress.bench.calibrate import breakeven
    from kvpress.bench.common.prompt import parts
    from kvpress.bench.common.text import default_text, read_text

    from kvpress.hf import calibration

    source = default_text() if wanted.text is None else read_text(wanted.text)
    use_threads(loading.threads)
    with errors.status(f"Loading {loading.model} …"):
        loaded, tokenizer = loading.source.load()
    texts = parts(loaded, tokenizer, source.content, wanted.tokens, wanted.samples)
    settings = wanted.settings(source.to_dict())
    found = begin(out, loaded, settings, wanted.local, wanted.first)
    if found.least is not None and len(found.done) == wanted.samples * len(found.tau_LN):
        console.print(heads_table(found.tau_LN))
        say_if_nothing_was_measured(out, measured=0)
        return
    found = _search(wanted, loaded, texts, found, out)
    with errors.status("Measuring from which length on it pays …"):
        least, gains = breakeven.break_even(loaded, texts[0], found)
    calibration.write(out, loaded, found._replace(least=least))
    show(found.tau_LN, gains, least, out)


def _search(wanted: SearchOptions, model: Any, texts: list[Any], found: Any, out: Path) -> Any:
    """Goes on with a search, and writes what is known after every layer."""
    from kvpress.bench.calibrate import search

    from kvpress.hf import calibration

    total = wanted.samples * len(found.tau_LN)
    with Progress(console=errors) as progress:
        task = progress.add_task("thresholds", total=total, completed=len(found.done))

        def on_layer(known: Any) -> None:
            calibration.write(out, model, known)
            progress.update(task, completed=len(known.done))

        bound = search.Bound(wanted.error, not wanted.absolute)
        return search.search(model, texts, found, bound, on_layer)


def begin(out: Path, model: Any, settings: dict[str, Any], local: int, first: float) -> Any:
    """The calibration in a file, if it is of the same search; otherwise one that knows nothing.

    Raises PolicyError for a file of another search.
    """
    import torch

    from kvpress.errors import PolicyError
    from kvpress.hf import calibration

    if out.exists():
        known = calibration.read(out, model)
        if (known.settings, known.local) != (settings, local):
            raise PolicyError(
                f"{out} holds a search with {known.settings} and local={known.local}, not with"
                f" {settings} and local={local}. Give another --out, or delete it."
            )
        return known
    config = model.config.get_text_config(decoder=True)
    first_LN = torch.full((config.num_hidden_layers, config.num_attention_heads), first)
    return calibration.Calibration(first_LN, local, None, settings, [])


def show(tau_LN: Any, gains: dict[int, float], least: int, out: Path) -> None:
    """Prints how many heads got which threshold, and the speed-up at every length."""
    console.print(heads_table(tau_LN))
    speed = new_table((), ("tokens", "speed-up"), "Attention, exact / sparse")
    for length, gain in gains.items():
        speed.add_row(f"{length:,}", f"{gain:.2f}×")
    console.print(Fitted(speed))
    if least in gains:
        paid = f"Sparse from {least:,} new tokens on."
    else:
        paid = "Sparse attention was not faster to the end at any length that was measured."
    console.print(f"{paid} Written to {out}.")


def heads_table(tau_LN: Any) -> Fitted:
    """How many heads got which threshold."""
    heads = new_table((), ("τ", "heads"), "Thresholds")
    for tau in sorted(set(tau_LN.flatten().tolist()), reverse=True):
        heads.add_row(f"{tau:.6g}" if tau else "dense", str(int((tau_LN == tau).sum())))
    return Fitted(heads)


sale.add_to(calibrate)
heads.add_to(calibrate)
