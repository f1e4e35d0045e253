"""The store: ragged rows of slots in pages."""

from kvpress.store.base import Column, Survivors
from kvpress.store.formatted import FormattedRows
from kvpress.store.packed import PackedRows
from kvpress.store.rows import PagedRows

Store = PagedRows | FormattedRows

__all__ = ["Column", "FormattedRows", "PackedRows", "PagedRows", "Store", "Survivors"]
