"""The command line of the view: `kvpress view`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import AsJson, PromptOptions, TieredOptions, use_threads
from kvpress.bench.common.output import check_writable, write
from rich.console import Console

from kvpress.errors import KVPressError

if TYPE_CHECKING:
    from kvpress.bench.common.text import Text

console, errors = Console(), Console(stderr=True)


class ViewError(KVPressError, ValueError):
    """A page that cannot be made as it was asked for."""


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What is made: a page, a picture of a layer, or plain data."""

    out: Annotated[Path, typer.Option(help="A .html file for the page.")] = Path("view.html")
    as_json: AsJson = False
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map",
            help="Instead: a .png of the blocks that a layer attends to.",
            show_default="none",
        ),
    ] = None
    layer: Annotated[int, typer.Option(help="The layer of --map.", min=0)] = 0
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Instead: a .json for chrome://tracing of a decode step whose pages are in tiers.",
            show_default="none",
        ),
    ] = None

    def check(self) -> None:
        """Raises ViewError, BadParameter or PlotError for what cannot be written."""
        if self.map_file is not None and self.trace is not None:
            raise typer.BadParameter("give only one of --map, --trace")
        if self.trace is not None:
            _check_trace(self.trace)
        elif self.map_file is not None:
            _check_map(self.map_file)
        else:
            _check_out(self.out)


@command("kvpress view --policy snapkv:budget=0.2 --out view.html")
def view(
    asking: PromptOptions,
    made: PageOptions,
    loading: TieredOptions,
    policy: Annotated[str, typer.Option(help="name:key=value,…")] = "snapkv:budget=0.2",
    prompt_tokens: Annotated[
        int, typer.Option(help="Length of the default prompt.", min=64)
    ] = 1000,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.", min=1)] = 32,
) -> None:
    """Show which tokens each layer and KV head kept, in the text itself, as one HTML page.

    The budget of each head is printed besides. The answer is decoded greedily. Of a policy that
    reads some pages only (quest, leoam) the page also shows what the last step read. Without a
    prompt, about 1,000 tokens of Python's language reference are used, with a question at the end.
    With --map: which blocks of the prompt's attention a sparse policy computes in one layer, per
    query head. With --trace: what each thread does in one decode step when not all pages are on the
    device; without --device, --host and --disk a quarter of the cache is there and a third on the
    host. These also take shares of the cache, as in --device 0.3.
    """
    from kvpress.bench.common.report import table
    from kvpress.bench.view.heads import sheet
    from kvpress.bench.view.kept import look
    from kvpress.bench.view.page import page

    from kvpress.policy.loading import parse

    parse(policy)  # refuse a wrong policy, file, prompt or cap before a model is loaded
    made.check()
    caps = _caps(loading, made)
    text = asking.given()
    use_threads(loading.threads)
    with errors.status(f"Loading {loading.model} …"):
        loaded, tokenizer = loading.source.load()
    with errors.status("Reading the prompt …"):
        whole = _wrap(text, tokenizer, asking.chat, prompt_tokens)
        if made.map_file is not None:
            _draw_map(loaded, tokenizer, whole, policy, made.layer, made.map_file)
            return
        if made.trace is not None:
            _trace(loaded, tokenizer, whole, policy, caps, made.trace)
            return
        options: dict[str, Any] = {
            "name": loading.model,
            "max_new_tokens": max_new_tokens,
            "caps": caps,
        }
        kept = look(loaded, tokenizer, whole, policy, **options)
    if made.as_json:
        sys.stdout.write(json.dumps(kept.to_dict()) + "\n")
    else:
        console.print(table(sheet(kept)))
        write(made.out, page(kept).encode())


def _caps(loading: TieredOptions, made: PageOptions) -> dict[str, Any]:
    """The caps of tiers, of a trace perhaps as shares. Raises BadParameter or TierError."""
    if made.trace is None:
        if loading.caps and made.map_file is not None:
            raise typer.BadParameter("--map is of prompts, which need no tiers: give no caps")
        return loading.caps
    from kvpress.bench.common.caps import check

    check(loading.given_caps)
    return loading.given_caps


def _trace(
    model: Any, tokenizer: Any, prompt: str, policy: str, caps: dict[str, Any], path: Path
) -> None:
    from kvpress.bench.view.trace import write_trace

    console.print(write_trace(model, tokenizer, prompt, policy, caps, path))
    console.print(f"Wrote {path}: open it with chrome://tracing or ui.perfetto.dev.")


def _check_trace(path: Path) -> None:
    """Raises ViewError or BadParameter for a file that cannot be the trace."""
    check_writable("--trace", path)
    if path.suffix != ".json":
        raise ViewError(f"--trace {path}: the name must end in .json.")


def _check_out(out: Path) -> None:
    """Raises ViewError or BadParameter for a file that cannot be the page."""
    check_writable("--out", out)
    if out.suffix != ".html":
        raise ViewError(f"--out {out}: the name must end in .html.")


def _check_map(path: Path) -> None:
    """Raises ViewError, BadParameter or PlotError for a picture that cannot be written."""
    from kvpress.bench.common import figures

    figures.require()
    check_writable("--map", path)
    if path.suffix != ".png":
        raise ViewError(f"--map {path}: the name must end in .png.")


def _draw_map(model: Any, tokenizer: Any, prompt: str, policy: str, layer: int, path: Path) -> None:
    from kvpress.bench.view import kept, maps

    from kvpress.formulas.block_map import Blocks

    ids_1T = kept.tokenize(model, tokenizer, prompt, 0)["input_ids"]
    blocks = Blocks(ids_1T.shape[1], ids_1T.shape[1])
    title = f"{policy}: layer {layer}, {blocks.slots:,} tokens"
    maps.draw(maps.computed_of(model, ids_1T, policy, layer), blocks, title, path)


def _wrap(text: Text | None, tokenizer: Any, chat: bool, tokens: int) -> str:
    """The prompt as the model gets it."""
    from kvpress.bench.common.prompt import as_chat, reference_prompt

    if text is None:
        return reference_prompt(tokenizer, tokens)
    return as_chat(tokenizer, text.content) if chat else text.content
