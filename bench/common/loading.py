"""What all loading of models shares: its error, and silence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from kvpress.errors import KVPressError


class ModelError(KVPressError):
    """A model that cannot be loaded."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings."""
    from transformers import utils

    logging: Any = utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
