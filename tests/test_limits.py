"""How large things may be: a reader holds one of them in mind. What we wrote has no exceptions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from each import each

ROOT = Path(__file__).parents[1]
TREES = ("kvpress", "policies", "csrc", "bench")
PYTHON = [path for tree in TREES for path in sorted((ROOT / tree).rglob("*.py"))]
ENDS = ("*.h", "*.cpp", "*.cu", "*.js", "*.css")
NATIVE = [path for tree in TREES for end in ENDS for path in sorted((ROOT / tree).rglob(end))]
NATIVE = [path for path in NATIVE if "third_party" not in path.parts]  # as others wrote it
MOST_LINES, MOST_TRITON = 300, 400  # of a file
MOST_FUNCTION, MOST_CLASS, MOST_METHODS = 40, 200, 25
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def nodes(path: Path, kind: type | tuple[type, ...]) -> Iterator[ast.AST]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, kind))


def lines_of(node: ast.AST) -> int:
    """Lines of a definition below its signature, without the docstring."""
    body = node.body
    documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    rest = body[1:] if documented else body
    return rest[-1].end_lineno - rest[0].lineno + 1 if rest else 0


@each([*PYTHON, *NATIVE], name)
def test_files_are_small(path: Path) -> None:
    most = MOST_TRITON if path.name.startswith("triton") else MOST_LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


@each(PYTHON, name)
def test_functions_and_classes_are_small(path: Path) -> None:
    for node in nodes(path, FUNCTIONS):
        assert lines_of(node) <= MOST_FUNCTION, f"{node.name} has {lines_of(node)} lines"
    for node in nodes(path, ast.ClassDef):
        methods = [part for part in node.body if isinstance(part, FUNCTIONS)]
        names = {method.name for method in methods}  # a property and its setter are one
        assert len(names) <= MOST_METHODS, f"{node.name} has {len(names)} methods"
        lines = node.end_lineno - node.lineno + 1
        assert lines <= MOST_CLASS, f"{node.name} has {lines} lines"


def test_classes_derive_from_at_most_one_of_ours() -> None:
    """A class and its base, never the base of a base; classes of others do not count."""
    bases: dict[str, set[str]] = {}  # of all classes of a name together
    for path in PYTHON:
        for node in nodes(path, ast.ClassDef):
            named = {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
            bases.setdefault(node.name, set()).update(named - {node.name})
    errors = {"KVPressError"}  # the root of all errors, which `except` needs
    for own, parents in bases.items():
        ours = parents & bases.keys() - errors
        above = {grand for parent in ours for grand in bases[parent] & bases.keys() - errors}
        assert len(ours) <= 1 and not above, f"{own} derives from {ours}, these from {above}"


@each(PYTHON, name)
def test_nobody_outside_the_store_asks_which_store_it_is(path: Path) -> None:
    if (ROOT / "kvpress" / "store") in path.parents:
        return
    stores = {"PagedRows", "PackedRows", "FormattedRows"}
    for node in nodes(path, ast.Call):
        if getattr(node.func, "id", "") == "isinstance":
            asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not asked & stores


def test_the_stores_know_nothing_private_of_one_another() -> None:
    """What begins with an underscore is touched through `self` or `cls` only."""
    for path in sorted((ROOT / "kvpress" / "store").rglob("*.py")):
        for node in nodes(path, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            of = node.value.id if isinstance(node.value, ast.Name) else ast.unparse(node.value)
            assert not private or of in {"self", "cls", "os"}, f"{name(path)}: {of}.{node.attr}"
