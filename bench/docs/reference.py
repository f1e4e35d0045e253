"""Tables of what the sources say of themselves: policies, operators, variables."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from kvpress.bench.docs.stages import replaced_by
from kvpress.bench.docs.tables import ROOT, code, escaped, text_table

from kvpress import env, types
from kvpress.policy import catalogue

# The packages of the engine, as data flows through them.
_ROOMS = ("serve", "batching", "hf", "pipe", "policy", "store", "formulas", "ops", "report")
_GROUPS = {
    "Choose what stays": ("score", "select"),
    "Divide the budget among heads and layers": ("allocate", "compete", "share"),
    "Let it stand for what went": ("absorb",),
    "Store it smaller": ("prune", "pack"),
    "Read a part of it in a step": ("retrieve",),
    "Read prompts sooner": ("sparsify",),
}
_BACKENDS = {
    "reference.py": "PyTorch",
    "bind.h": "C++",
    "triton_kernel.py": "Triton",
    "cuda_kernel.py": "CUDA",
}


def policies() -> str:
    """Their names, by what they do; docs/policies.md says what each is."""
    found, named = replaced_by(), set[str]()
    lines = []
    for title, stages in _GROUPS.items():
        names = sorted({name for stage in stages for name in found[stage]} - named)
        named.update(names)
        lines.append(f"{title}: {', '.join(map(code, names))}.")
    rest = sorted(entry.name for entry in catalogue.entries() if entry.name not in named)
    lines.append(f"Keep everything: {', '.join(map(code, rest))}.")
    wrapped = (textwrap.fill(x, 110, initial_indent="- ", subsequent_indent="  ") for x in lines)
    return "\n".join(wrapped)


def recipes() -> str:
    """Named recipes, and what was measured of each."""
    lines = ((code(a), code(b), escaped(c)) for a, b, c in catalogue.named())
    return text_table(("written", "what it is", "measured, question hidden"), lines)


def options() -> str:
    """A section for each policy: its sentence with the paper, and a table of its options."""
    parts = []
    for entry in catalogue.entries():
        parts += [f"### {entry.name}", "", f"{entry.summary} [File](../policies/{entry.name}.py)."]
        if entry.options:
            lines = (
                (code(name), code(default), escaped(text))
                for name, (default, text) in entry.options.items()
            )
            parts += ["", text_table(("option", "default", "what it is"), lines)]
        parts.append("")
    return "\n".join(parts).rstrip()


def packages() -> str:
    """A line for each package: its docstring's first sentence."""
    places = [ROOT / "kvpress" / "engine.py"]
    places += [ROOT / "kvpress" / name / "__init__.py" for name in _ROOMS]
    places += [ROOT / name / "__init__.py" for name in ("csrc", "policies", "bench")]
    return "\n".join(f"- `{_place(path)}`: {_said(path)}" for path in places)


def files() -> str:
    """A table for each package of the engine: its files, and the first sentence of each."""
    parts = []
    for name in _ROOMS:
        lines = []
        for path in sorted((ROOT / "kvpress" / name).rglob("*.py")):
            if path.name != "__init__.py":
                inside = path.relative_to(ROOT / "kvpress" / name)
                link = f"[`{inside}`](../{path.relative_to(ROOT)})"
                lines.append((link, escaped(_said(path))))
        parts += [f"### {name}", "", text_table(("file", "one sentence"), lines), ""]
    return "\n".join(parts).rstrip()


def _place(path: Path) -> str:
    """How a package or file is called; those of the engine without `kvpress/`."""
    place = path.relative_to(ROOT)
    name = f"{place.parent}/" if place.name == "__init__.py" else str(place)
    return name.removeprefix("kvpress/")


def _said(path: Path) -> str:
    """The first sentence of a file's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(doc.split("\n\n")[0].split())


def environment() -> str:
    """The variables that the engine reads."""
    lines = ((code(name), escaped(text)) for name, text in env.VARIABLES.items())
    return text_table(("variable", "what it does"), lines)


def legend() -> str:
    """The letters of shape suffixes."""
    letters = types.LEGEND.items()
    return text_table(("letter", "what it counts"), ((code(a), b) for a, b in letters))


def operators() -> str:
    """Every operator: the first sentence of its page, and where it runs."""
    lines = []
    for folder in sorted(path.parent for path in (ROOT / "csrc").glob("*/README.md")):
        where = (name for file, name in _BACKENDS.items() if (folder / file).is_file())
        link = f"[`{folder.name}`](../csrc/{folder.name}/README.md)"
        lines.append((link, _first_sentence(folder / "README.md"), ", ".join(where)))
    return text_table(("operator", "what it does", "backends"), lines)


def _first_sentence(path: Path) -> str:
    paragraph = " ".join(path.read_text(encoding="utf-8").split("\n\n")[1].split())
    plain = re.sub(r" \([^()]*\)", "", paragraph)
    sentence = re.split(r"(?<=\.) (?=[A-Z])|: |; ", plain, maxsplit=1)[0].strip()
    return escaped(f"{sentence.rstrip('.:')}.")


PARTS: Mapping[str, Callable[[], str]] = {
    "policies": policies,
    "recipes": recipes,
    "policy-options": options,
    "environment": environment,
    "packages": packages,
    "files": files,
    "legend": legend,
    "operators": operators,
}
