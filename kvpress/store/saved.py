"""What a store takes back from a file: every tensor there, in its type, its shape and its range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpress.errors import CacheError
from kvpress.store.base import Column

ANY = -1  # a size that the file decides


def expect(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[torch.dtype, Sequence[int]]]
) -> None:
    """Raises CacheError unless there are exactly the wanted tensors, of these types and shapes."""
    odd = sorted(tensors.keys() ^ wanted.keys())
    if odd:
        raise CacheError(f"{', '.join(odd)}: missing, or nothing that belongs here.")
    for name, (dtype, shape) in wanted.items():
        given = tensors[name]
        sizes = len(given.shape) == len(shape) and all(
            size in (ANY, actual) for size, actual in zip(shape, given.shape, strict=True)
        )
        if given.dtype != dtype or not sizes:
            raise CacheError(
                f"{name} is {given.dtype} {list(given.shape)}, not {dtype} {list(shape)}"
                f" ({ANY}: any)."
            )


def check_rows(
    state: Mapping[str, Tensor],
    columns: Mapping[str, Column],
    rows: int,
    page_slots: int,
    counters: Sequence[str],
) -> None:
    """Raises CacheError unless rows of pages can have given this.

    counters: the names of the tensors that have one number for each row.
    """
    wanted: dict[str, tuple[torch.dtype, Sequence[int]]] = {
        "table": (torch.int32, (rows, ANY)),
        **dict.fromkeys(counters, (torch.int64, (rows,))),
        **{f"page.{n}": (c.dtype, (ANY, *c.page_shape(page_slots))) for n, c in columns.items()},
    }
    beside = {f"aside.{n}": (c.dtype, (rows, ANY)) for n, c in columns.items() if c.volatile}
    if beside.keys() & state.keys():
        wanted |= beside
    expect(state, wanted)
    pages = {len(state[f"page.{name}"]) for name in columns}
    if len(pages) > 1:
        raise CacheError(f"The columns of slots have {sorted(pages)} pages.")
    _check_table(state["table"], state["owned"], pages.pop())
    counts, most = state["counts"], state["owned"] * page_slots
    if bool(((counts < 0) | (counts > most)).any()):
        raise CacheError(f"Rows hold {counts.tolist()} slots in pages for {most.tolist()}.")
    for name in beside.keys() & state.keys():
        if rows and state[name].shape[1] < int(counts.max()):
            raise CacheError(f"{name} has fewer slots than the rows.")


def _check_table(table_RW: Tensor, owned_R: Tensor, pages: int) -> None:
    """Raises CacheError unless rows name pages that exist, and every page is one of a row."""
    width = table_RW.shape[1]
    if bool(((owned_R < 0) | (owned_R > width)).any()):
        raise CacheError(f"Rows have {owned_R.tolist()} pages in a table of {width}.")
    held_RW = torch.arange(width, device="cpu") < owned_R[:, None]
    named, others = table_RW[held_RW], table_RW[~held_RW]
    if bool(((named < 0) | (named >= pages)).any()) or bool(others.any()):
        raise CacheError(f"Rows name pages that are not among the {pages} there are.")
    known = len(torch.unique(named))
    if known != pages:
        raise CacheError(f"Of {pages} pages {known} belong to rows.")
