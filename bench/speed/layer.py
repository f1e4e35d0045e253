"""Decode steps of one layer of a wide model: one that reads some pages beside one that reads all.

Keys and values are a text's, over and over (see `sparse.tiled`): as many slots as are asked for,
8 KV heads of 4 query heads each and 128 channels, one sequence. No linear layers run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from kvpress.bench.common.candidates import FULL
from kvpress.bench.common.journal import Row
from kvpress.bench.common.timing import Samples
from kvpress.bench.sparse.tiled import Shape, Tiles, fill, layer_of, step, tiles
from kvpress.bench.speed.decode import bytes_read, read_columns
from kvpress.bench.speed.rounds import run_rounds
from kvpress.bench.speed.rows import Cell, Column, against, of_ideal
from kvpress.bench.speed.setting import Setting
from kvpress.csrc.decode_chosen import Operands
from kvpress.csrc.decode_chosen.compose import Backend, composed
from torch import Tensor

from kvpress import ops
from kvpress.pipe.state.tokens import Tokens

NAME = "layer"
TITLE = "One decode step of one layer"
LEGEND = (
    "quartiles: of the steps. vs full: speed-up over reading everything, from medians; in brackets"
    " what bytes read would allow. selection: bounds, choice and certificate, in steps of their own"
    " between those that are timed, and its share of a step."
)
DTYPE = "bfloat16"  # of stored keys and values, where nothing else is asked for
_SELECTION = ("score_pages", "search_pages", "score_cells", "choose_pages", "missed_mass")
_WHOLE = "decode_chosen"
_INDEX = 2  # the first layer that quest and leoam read as they read the others


def measure(
    setting: Setting,
    model: Any,
    tokenizer: Any,
    cell: Cell,
    names: Sequence[str],
    on_round: Callable[[int], None] | None,
    **shape: Any,
) -> dict[str, Row]:
    """A row per policy. shape: other heads, channels or texts than `Shape` has."""
    dtype = setting.storage or DTYPE
    made = Shape(tokens=cell.tokens, dtype=dtype, index=_INDEX, **shape)
    with torch.inference_mode():
        given = tiles(model, tokenizer, made)
    wait = torch.cuda.synchronize if given.key_1HTD.is_cuda else None
    starts = {name: partial(_Step, made, given, name, wait) for name in names}
    return run_rounds(starts, setting.rounds, setting.warmup, on_round, wait)


class _Step:
    """A layer that gets a token per round, and one more between rounds, whose parts are timed."""

    def __init__(
        self, shape: Shape, given: Tiles, policy: str, wait: Callable[[], None] | None
    ) -> None:
        self._layer, self._given, self._wait = layer_of(shape, None, policy), given, wait
        fill(self._layer, given, shape.tokens, lambda _: None)
        self._next, self._selection = shape.tokens, list[float]()
        self._token = self._made()

    def round(self, number: int) -> Tensor:
        return step(self._layer, self._token)

    def settle(self, timed: bool) -> None:
        self._token = self._made()
        with _selecting(self._wait) as spent:
            self.round(0)
        self._token = self._made()
        if timed:
            self._selection.append(sum(spent))

    def _made(self) -> Tokens:
        """The next token: what linear layers would hand over."""
        self._next += 1
        return self._given.tokens(self._next - 1, self._next)

    def row(self, taken: Samples) -> Row:
        layer, reads = self._layer, self._layer.reads.figures
        own = None
        if reads is not None:
            rows = layer.kind.heads
            own = {
                "steps": reads.steps // rows,
                "tokens_read": reads.tokens_read,
                "bytes_read": reads.bytes_read * rows // reads.steps,
                "missed_mean": reads.missed_mean,
                "missed_max": reads.missed_max,
            }
        return {
            "tokens_per_second": 1 / taken.median,
            "bytes_held": layer.bytes_held,
            "reads": own,
            "selection": None if own is None else Samples(self._selection).to_dict(),
        }


@contextmanager
def _selecting(wait: Callable[[], None] | None) -> Iterator[list[float]]:
    """Seconds of every call of the operators that choose pages, or say what was missed.

    A step that is one operator is made of its parts meanwhile.
    """
    spent = list[float]()
    usual = {name: getattr(ops, name) for name in (*_SELECTION, _WHOLE)}

    def timed(call: Callable[..., Any], *operands: Any, **named: Any) -> Any:
        if wait is not None:
            wait()
        begun = perf_counter()
        made = call(*operands, **named)
        if wait is not None:
            wait()
        spent.append(perf_counter() - begun)
        return made

    try:
        for name in _SELECTION:
            setattr(ops, name, partial(timed, usual[name]))
        setattr(ops, _WHOLE, _by_parts)
        yield spent
    finally:
        for name, call in usual.items():
            setattr(ops, name, call)


def _by_parts(*operands: Any) -> tuple[Tensor, ...]:
    def run(name: str) -> Callable[[Any], Any]:
        return lambda given: getattr(ops, name)(*given)

    return composed(Operands(*operands), Backend(*map(run, Backend._fields)))


def columns(rows: dict[str, Row]) -> list[Column]:
    """What the table of one cell shows."""
    full = rows.get(FULL)
    return [
        Column("ms", lambda row: f"{1e3 * row['seconds']['median']:.2f}"),
        Column("quartiles", _quartiles),
        Column("MiB", lambda row: f"{row['bytes_held'] / 2**20:.0f}"),
        *read_columns(rows),
        Column("vs full", partial(_against_full, full)),
        Column("selection", _selection),
    ]


def _quartiles(row: Row) -> str:
    return "–".join(f"{1e3 * seconds:.2f}" for seconds in row["seconds"]["quartiles"])


def _against_full(full: Row | None, row: Row) -> str:
    return of_ideal(against(full, row), bytes_read(full or row) / bytes_read(row))


def _selection(row: Row) -> str:
    if row["selection"] is None:
        return "–"
    median = row["selection"]["median"]
    return f"{1e3 * median:.2f} ms, {median / row['seconds']['median']:.0%}"
