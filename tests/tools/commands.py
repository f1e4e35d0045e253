"""What every command says of itself, for docs/cli.md.

As a command it writes that page's part, or checks it:
`python tests/tools/commands.py docs/cli.md [--check]`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from kvpress.bench.docs.marks import fill
from kvpress.bench.docs.tables import code, escaped, text_table

from kvpress.cli import app


def markdown() -> str:
    """A section for every command: what it does, its arguments and its options."""
    root = typer.main.get_command(app)
    return "\n\n".join(_described(names, command) for names, command in _leaves("kvpress", root))


def _leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    for child, found in getattr(command, "commands", {}).items():
        if hasattr(found, "commands"):
            yield from _leaves(f"{name} {child}", found)
        else:
            yield f"{name} {child}", found


def _described(name: str, command: Any) -> str:
    arguments = (f" {p.name.upper()}" for p in command.params if p.param_type_name == "argument")
    help_text = (command.help or "").split("\f")[0].strip()
    parts = [
        f"## {name}",
        "",
        f"`{name} [OPTIONS]{''.join(arguments)}`",
        "",
        _paragraphs(help_text),
    ]
    lines = [_option(parameter) for parameter in command.params]
    if lines:
        parts += ["", text_table(("option", "default", "what it is"), lines)]
    if command.epilog:
        parts += ["", re.sub(r"^Example: (.*)$", r"Example: `\1`", command.epilog)]
    return "\n".join(parts)


def _paragraphs(text: str) -> str:
    """Lines of a paragraph joined."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _option(parameter: Any) -> tuple[str, str, str]:
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
    shown = ", ".join(map(code, names))
    return shown, _default(parameter), escaped(getattr(parameter, "help", None) or "")


def _default(parameter: Any) -> str:
    default, said = parameter.default, getattr(parameter, "show_default", None)
    if isinstance(said, str):
        return escaped(said)
    if default is None or default is False or default == [] or callable(default):
        return ""
    return code(", ".join(map(str, default)) if isinstance(default, list) else str(default))


if __name__ == "__main__":
    page, flag = Path(sys.argv[1]), "--check" in sys.argv[2:]
    if not fill(page, {"commands": markdown}, flag) and flag:
        sys.exit(f"The commands in {page} are out of date. Run scripts/lint.")
