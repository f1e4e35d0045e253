"""The command line of the view: `kvpress view`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from kvpress.bench.common import options
from kvpress.bench.common.models import Source
from kvpress.bench.common.output import check_writable, write
from rich.console import Console

from kvpress.errors import KVPressError

errors = Console(stderr=True)


class ViewError(KVPressError, ValueError):
    """A page that cannot be made as it was asked for."""


def view(
    model: options.Model = "demo",
    policy: Annotated[str, typer.Option(help="name:key=value,…")] = "snapkv:budget=0.2",
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text file that is the prompt.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="Length of the default prompt.", min=64)
    ] = 1000,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    chat: Annotated[bool, typer.Option(help="Wrap prompts in the model's chat template.")] = True,
    dtype: options.Dtype = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    threads: options.Threads = None,
    out: Annotated[Path, typer.Option(help="A .html file for the page.")] = Path("view.html"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was kept as JSON and write no page.")
    ] = False,
    map_file: Annotated[
        Path | None,
        typer.Option("--map", help="Instead: a .png of the blocks that a layer attends to."),
    ] = None,
    layer: Annotated[int, typer.Option(help="The layer of --map.", min=0)] = 0,
) -> None:
    """Show which tokens each layer and KV head kept, in the text itself, as one HTML page.

    The answer is decoded greedily. Without a prompt, about 1,000 tokens of Python's language
    reference are used, with a question at the end. With --map: which blocks of the prompt's
    attention a sparse policy computes in one layer, per query head.
    """
    import torch
    from kvpress.bench.view.kept import look
    from kvpress.bench.view.page import page

    from kvpress.policy.loading import parse

    parse(policy)  # refuse a wrong policy, file or prompt before a model is loaded
    if map_file is None:
        _check_out(out)
    else:
        _check_map(map_file)
    text = _given(prompt, prompt_file)
    if threads:
        torch.set_num_threads(threads)
    source = Source(model, dtype, device, device_map, revision, trust_remote_code)
    with errors.status(f"Loading {model} …"):
        loaded, tokenizer = source.load()
    with errors.status("Reading the prompt …"):
        whole = _wrap(text, tokenizer, chat, prompt_tokens)
        if map_file is not None:
            _draw_map(loaded, tokenizer, whole, policy, layer, map_file)
            return
        kept = look(loaded, tokenizer, whole, policy, name=model, max_new_tokens=max_new_tokens)
    if as_json:
        sys.stdout.write(json.dumps(kept.to_dict()) + "\n")
    else:
        write(out, page(kept).encode())


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


def _given(prompt: str | None, prompt_file: Path | None) -> str | None:
    """The text of the prompt, None for the default one. Raises BadParameter."""
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give only one of --prompt and --prompt-file")
    if prompt_file is None:
        return prompt
    try:
        return prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{prompt_file} cannot be read as UTF-8 text: {error}") from error


def _wrap(text: str | None, tokenizer: Any, chat: bool, tokens: int) -> str:
    """The prompt as the model gets it."""
    from kvpress.bench.common.prompt import as_chat, reference_prompt

    if text is None:
        return reference_prompt(tokenizer, tokens)
    return as_chat(tokenizer, text) if chat else text
