"""The store: ragged rows of slots in pages."""

from kvpress.store.base import Column, Survivors
from kvpress.store.pages import PagedRows

__all__ = ["Column", "PagedRows", "Survivors"]
