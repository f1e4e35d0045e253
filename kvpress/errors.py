"""The exceptions of the engine. Each says what was given, what is allowed, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class KVPressError(Exception):
    """Base of all errors of this engine."""


class PolicyError(KVPressError, ValueError):
    """A policy specification, option or combination that cannot work."""


class BudgetError(KVPressError, ValueError):
    """A budget that cannot be read or cannot be met."""


class PlanError(KVPressError, ValueError):
    """A plan that cannot fit its memory, or texts that an engine was not planned for."""


class AttachError(KVPressError, RuntimeError):
    """The engine cannot be attached, or is used while it is not attached."""


class UnsupportedModelError(AttachError):
    """A model family, layer kind or model option that the engine refuses.

    reason: the part of the message that all models share which are refused for it.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class CacheError(KVPressError, RuntimeError):
    """A cache used in a way that it cannot answer correctly."""


class CacheFileError(CacheError):
    """A file from which no cache can be loaded."""


class TierError(KVPressError, RuntimeError):
    """The host or the disk tier cannot hold, write or read what it was asked to."""


class TierIntegrityError(TierError):
    """Bytes on the disk that are not the ones that were written. They are never handed out."""


class TierTimeoutError(TierError):
    """A tier that did not answer before the deadline."""


class InputError(KVPressError, TypeError):
    """Something else than token ids where token ids are taken."""


class MaskError(KVPressError, ValueError):
    """An attention mask that the engine cannot honour."""


class OperatorError(KVPressError, RuntimeError):
    """Operands that an operator cannot work on."""


class BackendError(KVPressError, RuntimeError):
    """A backend that was asked for and cannot run."""


class ServingError(KVPressError, RuntimeError):
    """A request that was not served to its end."""


class RefusedError(ServingError):
    """A request that cannot be taken now. retry_after: seconds after which it may be."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooLargeError(ServingError, ValueError):
    """A request that could never be served: more tokens or bytes than there may be."""


class DeadlineError(ServingError, TimeoutError):
    """A request that took longer than it was given."""


class ImportClashError(KVPressError, ImportError):
    """Another distribution owns the import name ``kvpress`` in this environment."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """The tail of an error message: close matches of `given` first, then everything allowed."""
    names = sorted(allowed)
    lower = {name.lower(): name for name in names}
    close = [lower[x] for x in get_close_matches(given.lower(), lower, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
    return f"{hint} Allowed: {', '.join(names) if names else 'none'}."
