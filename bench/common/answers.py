"""The other side of `lines.py`: answers requests until standard input ends.

This file needs nothing but torch: it also runs beside packages that share this one's import name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def answer(reply_to: Answer) -> None:
    """Answers every line of standard input with a line; a request that fails, with its error."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what others print must not mix with replies
    for line in sys.stdin:
        try:
            with torch.inference_mode():
                reply = reply_to(json.loads(line))
        except Exception as error:  # the other side decides what a failure means
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
