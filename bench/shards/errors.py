"""What goes wrong where processes share a run."""

from __future__ import annotations

from kvpress.errors import KVPressError


class ShardError(KVPressError, RuntimeError):
    """Processes that cannot share a run, or one of them that was lost."""
