"""Generated parts of a page: what stands between two marks is replaced, the rest is left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from kvpress.errors import KVPressError

_BLOCK = re.compile(
    r"<!-- (?P<name>[\w-]+): made by scripts/lint -->\n(?P<body>.*?)<!-- end of (?P=name) -->",
    re.DOTALL,
)
_ANY = re.compile(r"<!-- (?:[\w-]+: made by scripts/lint|end of [\w-]+) -->")


def bodies(text: str) -> dict[str, str]:
    """The generated parts of a page by name. Raises KVPressError where a mark has no partner."""
    found = {match["name"]: match["body"] for match in _BLOCK.finditer(text)}
    if len(_ANY.findall(text)) != 2 * len(found):
        raise KVPressError(
            "A generated part must stand once, between '<!-- NAME: made by scripts/lint -->' and"
            f" '<!-- end of NAME -->'. Found whole: {', '.join(found) or 'none'}."
        )
    return found


def filled(text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """The page with those of its generated parts that have a maker here made anew."""

    def made(match: re.Match[str]) -> str:
        name = match["name"]
        body = f"{parts[name]()}\n" if name in parts else match["body"]
        return f"<!-- {name}: made by scripts/lint -->\n{body}<!-- end of {name} -->"

    bodies(text)
    return _BLOCK.sub(made, text)


def update(path: Path, content: str, check: bool) -> bool:
    """Writes a file, or only checks it. Returns True if it was right already."""
    right = path.is_file() and path.read_text(encoding="utf-8") == content
    if not right and not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return right


def fill(path: Path, parts: Mapping[str, Callable[[], str]], check: bool) -> bool:
    """Fills the generated parts of a page, or only checks them. True if they were right already."""
    return update(path, filled(path.read_text(encoding="utf-8"), parts), check)
