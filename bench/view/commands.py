"""The command line of the view: `kvpress view`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.command import command
from kvpress.bench.common.options import AsJson, ModelOptions, PromptOptions, use_threads
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

    def check(self) -> None:
        """Raises ViewError, BadParameter or PlotError for what cannot be written."""
        if self.map_file is None:
            _check_out(self.out)
        else:
            _check_map(self.map_file)


@command("kvpress view --policy snapkv:budget=0.2 --out view.html")
def view(
    asking: PromptOptions,
    made: PageOptions,
    loading: ModelOptions,
    policy: Annotated[str, typer.Option(help="name:key=value,…")] = "snapkv:budget=0.2",
    prompt_tokens: Annotated[
        int, typer.Option(help="Length of the default prompt.", min=64)
    ] = 1000,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.", min=1)] = 32,
) -> None:
    """Show which tokens each layer and KV head kept, in the text itself, as one HTML page.

    The budget of each head is printed besides. The answer is decoded greedily. Without a prompt,
    about 1,000 tokens of Python's language reference are used, with a question at the end. With
    --map: which blocks of the prompt's attention a sparse policy computes in one layer, per query
    head.
    """
    from kvpress.bench.common.report import table
    from kvpress.bench.view.heads import sheet
    from kvpress.bench.view.kept import look
    from kvpress.bench.view.page import page

    from kvpress.policy.loading import parse

    parse(policy)  # refuse a wrong policy, file or prompt before a model is loaded
    made.check()
    text = asking.given()
    use_threads(loading.threads)
    with errors.status(f"Loading {loading.model} …"):
        loaded, tokenizer = loading.source.load()
    with errors.status("Reading the prompt …"):
        whole = _wrap(text, tokenizer, asking.chat, prompt_tokens)
        if made.map_file is not None:
            _draw_map(loaded, tokenizer, whole, policy, made.layer, made.map_file)
            return
        name = loading.model
        kept = look(loaded, tokenizer, whole, policy, name=name, max_new_tokens=max_new_tokens)
    if made.as_json:
        sys.stdout.write(json.dumps(kept.to_dict()) + "\n")
    else:
        console.print(table(sheet(kept)))
        write(made.out, page(kept).encode())


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
