"""What operators take is declared once: schemas and flat lists follow from it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from each import each, name_of
from torch import Tensor

from kvpress import ops
from kvpress.ops.operands import flattening, grouped, leaves, schema
from kvpress.types import NoiseKind

ROOT = Path(__file__).parents[2]
FOLDERS = ("kvpress", "csrc", "bench", "tests")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
NAMES = ops.names()
MOST = 8  # operands and groups that one call tells apart by their places alone


class Pair(NamedTuple):
    """A group."""

    key_BHSD: Tensor
    count_B: Tensor | None


class Operands(NamedTuple):
    """Of no operator."""

    query_BNQD: Tensor
    pair: Pair
    noise: NoiseKind
    sizes: Sequence[int]
    scaling: float = 1.0


class WiderPair(NamedTuple):
    """A group with one operand more."""

    key_BHSD: Tensor
    count_B: Tensor | None
    sink: int


class More(NamedTuple):
    """With one operand more, and one more in the group."""

    query_BNQD: Tensor
    pair: WiderPair
    noise: NoiseKind
    sizes: Sequence[int]
    scaling: float = 1.0
    evict: bool = False


def test_a_schema_follows_from_the_operands() -> None:
    assert schema("some", Operands, "Tensor out", writes=("key_BHSD", "count_B")) == (
        "some(Tensor query_BNQD, Tensor(a!) key_BHSD, Tensor(b!)? count_B, str noise, int[] sizes,"
        " float scaling) -> Tensor out"
    )


def test_another_operand_is_declared_in_one_place() -> None:
    """A field comes into the schema, into the flat list and back, with nothing else."""
    wider = schema("some", Operands, "()").replace("count_B,", "count_B, int sink,")
    assert schema("some", More, "()") == wider.replace(") ->", ", bool evict) ->")
    x = torch.zeros(1)
    pair = WiderPair(x, None, 4)
    values = flattening(More)(x, pair, "none", [1], evict=True)
    assert values == (x, x, None, 4, "none", [1], 1.0, True)
    assert grouped(More, values) == More(x, pair, "none", [1], evict=True)


@each(NAMES)
def test_every_schema_is_that_of_its_operands(name: str) -> None:
    ops.backends()
    module = importlib.import_module(f"kvpress.csrc.{name}")
    arguments = getattr(torch.ops.kvpress, name).default._schema.arguments
    assert [argument.name for argument in arguments] == list(leaves(module.Operands))
    assert len(module.Operands._fields) <= MOST


def places(call: ast.Call) -> int:
    """Positional arguments; those of a tuple that is spread count each."""
    spread = [getattr(getattr(arg, "value", None), "elts", [arg]) for arg in call.args]
    return sum(map(len, spread))


@each(FILES, name_of)
def test_no_operator_is_called_with_many_operands(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            assert called not in NAMES or places(node) <= MOST, f"line {node.lineno}"
