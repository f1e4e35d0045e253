"""The store: ragged rows of slots in pages."""

from kvpress.store.base import Column, Survivors
from kvpress.store.formatted import FormattedRows
from kvpress.store.packed import PackedRows
from kvpress.store.paged import PagedRows
from kvpress.store.rows import Aging, Rows
from kvpress.store.streamed import tiered_rows

__all__ = [
    "Aging",
    "Column",
    "FormattedRows",
    "PackedRows",
    "PagedRows",
    "Rows",
    "Survivors",
    "tiered_rows",
]
