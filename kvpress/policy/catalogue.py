"""The table of policies that `kvpress policies` and the README show, from their docstrings."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

from kvpress.errors import KVPressError
from kvpress.policy.base import Policy
from kvpress.policy.loading import available
from kvpress.policy.options import as_text


class Entry(NamedTuple):
    """A policy: its name, the first paragraph of its docstring, its options and defaults."""

    name: str
    summary: str
    options: dict[str, tuple[str, str]]  # name -> (default, help)


def entries() -> list[Entry]:
    """Every installed policy."""
    return [_entry(name, cls) for name, cls in available().items()]


def markdown() -> str:
    """The table for the README."""
    lines = ["| policy | what it does | options and defaults |", "|---|---|---|"]
    for entry in entries():
        options = ", ".join(f"`{name}={default}`" for name, (default, _) in entry.options.items())
        lines.append(f"| `{entry.name}` | {entry.summary} | {options or 'none'} |")
    return "\n".join(lines)


def replace_block(path: Path, name: str, body: str, check: bool) -> bool:
    """Writes the generated block of a name into a file, or only checks it.

    Returns True if the file was right already. Raises KVPressError without the block's marks.
    """
    begin, end = f"<!-- {name}: made by scripts/lint -->", f"<!-- end of {name} -->"
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise KVPressError(f"{path} must hold the lines '{begin}' and '{end}' once.")
    head, rest = text.split(begin)
    made = f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"
    if made != text and not check:
        path.write_text(made, encoding="utf-8")
    return made == text


def _entry(name: str, cls: type[Policy]) -> Entry:
    doc = sys.modules[cls.__module__].__doc__ or ""
    options = {
        f.name: (as_text(f.default), str(f.metadata.get("help", "")))
        for f in dataclasses.fields(cls)
    }
    return Entry(name, " ".join(doc.split("\n\n")[0].split()), options)


if __name__ == "__main__":
    readme, flag = Path(sys.argv[1]), "--check" in sys.argv[2:]
    if not replace_block(readme, "policies", markdown(), flag) and flag:
        sys.exit(f"The policy table in {readme} is out of date. Run scripts/lint.")
