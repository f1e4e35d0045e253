"""The command line: `kvpress run`, `serve`, `plan`, `eval`, `report`, `bench`, and others."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from kvpress import __version__, env
from kvpress.bench.calibrate.commands import calibrate
from kvpress.bench.commands import bench
from kvpress.bench.common.models import Source
from kvpress.bench.common.options import AsJson
from kvpress.bench.distill.commands import distill
from kvpress.bench.pages.commands import plot, report
from kvpress.bench.plan.commands import plan
from kvpress.bench.quality.commands import evaluate
from kvpress.bench.run.commands import run
from kvpress.bench.view.commands import view
from kvpress.errors import KVPressError
from kvpress.ops import versions
from kvpress.report.tables import Fitted, new_table
from kvpress.serve.command import serve

app = typer.Typer(
    help="A KV-cache compression engine for Hugging Face models that really frees the bytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)
app.add_typer(bench, name="bench")
app.add_typer(calibrate, name="calibrate")
distill.add_to(app)
run.add_to(app)
serve.add_to(app)
plan.add_to(app)
evaluate.add_to(app, "eval")
report.add_to(app)
plot.add_to(app)
view.add_to(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"kvpress-engine {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show it.", callback=_show_version, is_eager=True),
    ] = False,
) -> None: ...


@app.command(epilog="Example: kvpress policies --json")
def policies(
    markdown: Annotated[bool, typer.Option(help="Print as a table in Markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the installed policies with their options."""
    from kvpress.policy import catalogue

    entries = catalogue.entries()
    if as_json:
        sys.stdout.write(json.dumps([entry._asdict() for entry in entries], indent=2) + "\n")
        return
    if markdown:
        sys.stdout.write(catalogue.markdown() + "\n")
        return
    table = new_table(("policy", "what it does", "options"))
    for entry in entries:
        options = "\n".join(
            f"{n}={default}  {text}" for n, (default, text) in entry.options.items()
        )
        table.add_row(Text(entry.name), Text(entry.summary), Text(options), end_section=True)
    console.print(Fitted(table))
    if named := catalogue.named():
        table = new_table(("named recipe", "what it is", "measured, question hidden"))
        for line in named:
            table.add_row(*map(Text, line))
        console.print(Fitted(table))


@app.command(epilog="Example: kvpress build")
def build() -> None:
    """Compile the CPU operators now, for images and for measurements that must not wait."""
    from kvpress.ops import build_cpu

    console.print(
        f"The CPU operators are built: {build_cpu.build()}", highlight=False, soft_wrap=True
    )


@app.command(epilog="Example: kvpress info --model Qwen/Qwen3.5-4B")
def info(
    model: Annotated[
        str | None,
        typer.Option(help="Say what would happen to this model: demo, an ID or a folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, devices and operators; or what would happen to a model, by its config."""
    if model is not None:
        _show_fate(model, as_json)
        return
    facts = _facts()
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    for title, values in facts.items():
        table = new_table((title, ""))
        for key, value in values.items():
            table.add_row(Text(key), Text(str(value)))
        console.print(Fitted(table), "")


def _show_fate(source: str, as_json: bool) -> None:
    from kvpress.hf.fate import fate

    found = fate(Source(source).config())
    if as_json:
        parts = [part._asdict() for part in found.parts]
        plain = found._asdict() | {"parts": parts, "token_bytes": found.token_bytes}
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
        return
    if found.refused:
        console.print(f"{found.model_type} is refused: {found.refused}.", highlight=False)
        return
    table = new_table(("layers", "what happens"), ("KV heads", "channels", "bytes a token"))
    for part in found.parts:
        span = str(part.first) if part.first == part.last else f"{part.first}–{part.last}"
        sizes = (part.heads, part.width, part.token_bytes)
        table.add_row(span, part.what, *(f"{size:,}" if size else "–" for size in sizes))
    console.print(Fitted(table))
    console.print(
        f"A token takes {found.token_bytes:,} bytes in the layers that policies compress.",
        highlight=False,
    )


def _facts() -> dict[str, dict[str, Any]]:
    import torch

    from kvpress import ops
    from kvpress.ops import build_cpu

    names = ("torch", "transformers", "accelerate", "safetensors", "triton", "gguf", "lm-eval")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": (
            {"kvpress-engine": __version__, "python": platform.python_version()}
            | {name: _version(name) for name in names}
        ),
        "devices": {
            "cpu": f"{build_cpu.processor()}, {torch.get_num_threads()} threads",
            "cuda": ", ".join(gpus) or "none: torch sees no CUDA device",
        },
        "operators": {
            **{f"on {device}": backend for device, backend in ops.backends().items()},
            "instruction set": ops.instruction_set() or "none: no C++ operator runs",
            "names": ", ".join(ops.names()),
        },
        "environment": {name: f"{_setting(name)} – {text}" for name, text in env.VARIABLES.items()},
    }


def _setting(name: str) -> str:
    return str(env.cache_folder()) if name == "KVPRESS_CACHE" else os.environ.get(name, "not set")


def _version(name: str) -> str:
    version = versions.installed(name)
    if version is None:
        return "not installed"
    if name not in versions.PROVEN:
        return version
    oldest, newest = versions.PROVEN[name]
    doubt = "not proven; " if versions.unproven(name) else ""
    return f"{version} ({doubt}the tests prove {oldest} to {newest})"


def main() -> None:
    """The entry point: engine errors become one message and exit status 2."""
    try:
        app(prog_name="kvpress")
    except KVPressError as error:
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        # Lines and paths stay whole, so that they can be copied.
        errors.print(str(error), highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
