"""The command line that trains a head: `kvpress distill`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import REFERENCE, ModelOptions, use_threads
from kvpress.bench.common.output import check_writable, say_if_nothing_was_measured
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from kvpress.bench.distill.maps import Map

console, errors = Console(), Console(stderr=True)
_EVERY = 25  # steps after which what is known is written
_FIRST = 256  # place of the first query: before it there is hardly anything to choose from


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a head learns from, and how long."""

    text: Annotated[
        Path | None,
        typer.Option(help="A text; its last fifth is not read.", show_default=REFERENCE),
    ] = None
    tokens: Annotated[int, typer.Option(help="Of a context.", min=512)] = 3072
    contexts: Annotated[int, typer.Option(help="That the model reads.", min=1)] = 10
    queries: Annotated[int, typer.Option(help="Of a context, that are learned from.", min=8)] = 256
    steps: Annotated[int, typer.Option(help="Of the training.", min=1)] = 300
    rate: Annotated[float, typer.Option(help="The learning rate.", min=1e-6)] = 2e-3
    from_layer: Annotated[
        float, typer.Option(help="The first layer learned from, as a share.", min=0.0, max=0.99)
    ] = 1 / 3
    seed: Annotated[int, typer.Option(help="Of contexts, weights and steps.", min=0)] = 0

    def settings(self, text: dict[str, str], sizes: Any) -> dict[str, Any]:
        """What tells trainings apart. text: its name and hash."""
        own = {name: value for name, value in asdict(self).items() if name != "text"}
        return {"text": text, **own, "sizes": asdict(sizes)}


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """How large the head is."""

    width: Annotated[int, typer.Option(help="Channels of a key.", min=8)] = 64
    group: Annotated[int, typer.Option(help="Query heads of a KV head.", min=1)] = 3
    channels: Annotated[int, typer.Option(help="Of what is made of one token.", min=8)] = 128
    window: Annotated[int, typer.Option(help="Last tokens that a key sees singly.", min=2)] = 6
    far: Annotated[int, typer.Option(help="Tokens before these, seen as a mean.", min=0)] = 26


@command("kvpress distill --contexts 2 --tokens 1024 --steps 20 --out demo-head.safetensors")
def distill(
    wanted: TrainingOptions,
    size: SizeOptions,
    loading: ModelOptions,
    out: Annotated[
        Path, typer.Option(help="The file; an interrupted training goes on from it.")
    ] = Path("head.safetensors"),
) -> None:
    """Train a retrieval head on what the model attends to.

    The model reads contexts made of a text, with facts that are asked for and passages that come
    again. A head of one layer learns from its embeddings which tokens far back it will attend to.
    Compare it with others: `kvpress bench heads`.
    """
    from kvpress.bench.common.text import default_text, read_text
    from kvpress.bench.distill.contexts import Maker, split

    from kvpress.hf.heads import distilled
    from kvpress.hf.heads.base import shape_of

    check_writable("--out", out)
    source = default_text() if wanted.text is None else read_text(wanted.text)
    use_threads(loading.threads)
    with errors.status(f"Loading {loading.model} …"):
        model, tokenizer = loading.source.load()
    heads, _, hidden = shape_of(model)
    sizes = distilled.Sizes(hidden=hidden, heads=heads, **asdict(size))
    settings = wanted.settings(source.to_dict(), sizes)
    known = begin(out, model, settings)
    if known is not None and known.finished:
        say_if_nothing_was_measured(out, measured=0)
        return
    maker = Maker(tokenizer, split(tokenizer, source.content)[0], wanted.tokens)
    maps = _read(model, maker, wanted)
    loss = _train(model, sizes, known, maps, wanted, settings, out)
    held = sizes.heads * sizes.width * 2
    console.print(
        f"Cross-entropy at the end: {loss:.3f}. The head keeps {held} bytes a token (in 16 bits)."
        f" Written to {out}."
    )


def begin(out: Path, model: Any, settings: dict[str, Any]) -> Any:
    """What is in a file, if it is of the same training; None without one.

    Raises PolicyError for a file of another training or another model.
    """
    from kvpress.errors import PolicyError
    from kvpress.hf.heads import distilled

    if not out.exists():
        return None
    known = distilled.read(out, model)
    if known.training != settings:
        raise PolicyError(
            f"{out} holds a training with {known.training}, not with {settings}. Give another"
            " --out, or delete it."
        )
    return known


def _read(model: Any, maker: Any, wanted: TrainingOptions) -> list[Map]:
    """What the model attends to in every context."""
    from kvpress.bench.distill.contexts import sampled
    from kvpress.bench.distill.maps import Always, averaged

    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    chosen, maps = range(int(layers * wanted.from_layer), layers), []
    with Progress(console=errors) as progress:
        task = progress.add_task("contexts", total=wanted.contexts)
        for number in range(wanted.contexts):
            context = maker.make(f"train-{wanted.seed}", number)
            first = min(_FIRST, wanted.tokens // 2)
            places = sampled(context, wanted.queries, first, f"{wanted.seed}-{number}")
            maps.append(averaged(model, context.ids, places, Always(), chosen))
            progress.update(task, completed=number + 1)
    return maps


def _train(
    model: Any,
    sizes: Any,
    known: Any,
    maps: list[Map],
    wanted: TrainingOptions,
    settings: dict[str, Any],
    out: Path,
) -> float:
    """Goes on with a training, and writes what is known now and then. Returns the mean loss."""
    import torch
    from kvpress.bench.distill import training
    from kvpress.bench.distill.beginning import weights_of
    from kvpress.bench.distill.maps import Always

    from kvpress.hf.heads import distilled

    embedding = model.get_input_embeddings()
    if known is None:
        word_Y = torch.unique(torch.cat([seen.id_T for seen in maps]))
        weights = weights_of(sizes, embedding(word_Y).detach().float(), wanted.seed)
        state = training.State.begun(weights)
    else:
        state = training.State.of(known.tensors, known.done)
    losses: list[float] = []
    how = training.How(steps=wanted.steps, rate=wanted.rate, seed=wanted.seed)

    def write(now: Any, finished: bool) -> None:
        tensors = now.weights if finished else now.tensors()
        found = distilled.Trained(tensors, sizes, settings, now.done, finished)
        distilled.write(out, model, found)

    with Progress(console=errors) as progress:
        task = progress.add_task("steps", total=wanted.steps, completed=state.done)

        def on_step(now: Any, loss: float) -> None:
            losses.append(loss)
            if now.done % _EVERY == 0 and now.done < wanted.steps:
                write(now, finished=False)
            progress.update(task, completed=now.done)

        state = training.train(sizes, state, maps, embedding, Always(), how, on_step)
    write(state, finished=True)
    return sum(losses[-50:]) / max(1, len(losses[-50:]))
