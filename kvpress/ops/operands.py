"""What operators take: groups of operands, and what follows from them: schemas and flat lists.

Every operator declares its operands once, as the named tuple `Operands` of its folder, whose fields
are tensors, numbers, words and the groups below. PyTorch gets them flat.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from kvpress.types import NoiseKind, Rank

_Form = TypeVar("_Form", bound=tuple[Any, ...])
new = tuple.__new__  # makes a group from all its fields at a third of the cost: for every step


class Token(NamedTuple):
    """The newest token of every sequence: its queries, keys and values."""

    query_BN1D: Tensor
    key_BH1D: Tensor
    value_BH1E: Tensor


class Pages(NamedTuple):
    """The slots of some rows: pools of pages, which of them are a row's, how many slots it has."""

    key_PDS: Tensor
    value_PSE: Tensor
    table_RW: Tensor  # int32
    counts_R: Tensor  # int64


class RowPages(NamedTuple):
    """Which whole pages are a row's: the first `pages_R` of its table; the rest may be anything."""

    table_RW: Tensor  # int32
    pages_R: Tensor  # int64


class Places(NamedTuple):
    """Some of the pages of rows, by their places in the table: ascending, then −1; how many."""

    place_RW: Tensor  # int32
    chosen_R: Tensor  # int64


class Always(NamedTuple):
    """Which pages rows read anyway: with a position below `sink_R`, or one not below `from_R`.

    span_P2: the first and the last position of every page.
    """

    span_P2: Tensor  # int32
    sink_R: Tensor  # int64
    from_R: Tensor  # int64


class Choice(NamedTuple):
    """How a step chooses pages; its first `sink` and last `recent` tokens are always read.

    bits: of cells; 0: boxes alone judge. candidates: pages that cells judge, times as many as may
    be read; 0: all.
    """

    sink: int
    recent: int
    bits: int
    candidates: int


class Columns(NamedTuple):
    """What is kept of every slot beside its key and value: int32 and fp32."""

    position_PS: Tensor
    mass_PS: Tensor | None


class Bounds(NamedTuple):
    """Which slots stay: of more than `quota_R` the one that ranks lowest goes.

    seen_B: tokens of each sequence. A row keeps the first `sink_B` and the last `recent_R` of them.
    Rows are numbered sequence · heads + head. All int64.
    """

    seen_B: Tensor
    quota_R: Tensor
    recent_R: Tensor
    sink_B: Tensor
    rank: Rank


class Logits(NamedTuple):
    """How logits follow from products: times `scaling`, capped by a tanh unless `softcap` is 0."""

    scaling: float
    softcap: float = 0.0


class Noise(NamedTuple):
    """The noise on logits whose weights are summed, and the temperature of their softmax.

    first: the number that the first query head here has in the model, where other processes have
    the rest: noise is drawn by the heads of the model.
    """

    noise: NoiseKind
    tau: float
    seed: int
    layer: int
    first: int = 0


class Reduction(NamedTuple):
    """What the weights of queries become for a slot: a sum, or the largest, of the last `window`.

    weight_BQ: fp32, of every query; its softmax weights are multiplied by it before. None: by 1.
    """

    window: int
    largest: bool = False
    weight_BQ: Tensor | None = None


class Turning(NamedTuple):
    """How keys turn with their positions, as `Rotation` says. None: they do not."""

    frequency_F: Tensor | None = None
    interleaved: bool = False
    start: int = 0


class Old(NamedTuple):
    """Parts of old slots: the tensors of all parts, and their layouts one after the other."""

    tensors: Sequence[Tensor] = ()
    layouts: Sequence[int] = ()


def schema(name: str, operands: type, returns: str, writes: Collection[str] = ()) -> str:
    """The schema of an operator in PyTorch's language.

    returns: its results, as they stand there. writes: the operands that it changes in place.
    """
    marks = iter("abcdefghijklmnopqrstuvwxyz")
    parts = []
    for operand, kind in leaves(operands).items():
        text = _kind(kind)
        if operand in writes:
            text = text.replace("Tensor", f"Tensor({next(marks)}!)")
        parts.append(f"{text} {operand}")
    return f"{name}({', '.join(parts)}) -> {returns}"


def leaves(operands: type) -> dict[str, Any]:
    """Name -> type of every operand, those of groups included, in the order of the schema."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(operands).items():
        inner = leaves(kind) if _is_group(kind) else {name: kind}
        assert not found.keys() & inner, f"two operands are called {found.keys() & inner}"
        found |= inner
    return found


@functools.cache
def flattening(form: Any) -> Callable[..., tuple[Any, ...]]:
    """A function that takes the fields of `form`, by place or by name, and returns them flat.

    It is made of text, as named tuples are: one expression is all that a call costs.
    """
    names = [f"{name}={name}" if name in form._field_defaults else name for name in form._fields]
    groups = {name for name, kind in get_type_hints(form).items() if _is_group(kind)}
    values = [f"*{name}" if name in groups else name for name in form._fields]
    source = f"lambda {', '.join(names)}: ({', '.join(values)},)"
    made: Callable[..., tuple[Any, ...]] = eval(source, dict(form._field_defaults))
    return made


def grouped(form: Callable[..., _Form], values: Sequence[Any]) -> _Form:
    """The operands from what `flattening` made of them."""
    made, begin = [], 0
    for group, length in _groups(form):
        end = begin + length
        made.append(group(*values[begin:end]) if group else values[begin])
        begin = end
    return form(*made)


def named(operands: tuple[Any, ...]) -> dict[str, Any]:
    """Name -> value of every operand, those of groups included."""
    form = type(operands)
    return dict(zip(leaves(form), flattening(form)(*operands), strict=True))


@functools.cache
def _groups(form: Any) -> list[tuple[type | None, int]]:
    """For every field its group, and how many operands it is made of."""
    kinds = get_type_hints(form).values()
    return [(kind, len(leaves(kind))) if _is_group(kind) else (None, 1) for kind in kinds]


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple)


def _kind(kind: Any) -> str:
    """A type of Python's as PyTorch writes it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (some,) = (x for x in inner if x is not type(None))
        return f"{_kind(some)}?"
    if origin is Literal:
        return "str"
    if inner:
        return f"{_kind(inner[0])}[]"
    return str(kind.__name__)
