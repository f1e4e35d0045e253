"""Bodies of requests: bounded before they are read, and JSON of an object."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request

from kvpress.serve.fields import Fields
from kvpress.serve.problems import Problem


def most_bytes(most_context: int) -> int:
    """How long a body may be: four times the longest prompt, of four bytes a token."""
    return max(4 * 4 * most_context, 64 * 1024)


async def read(request: Request, most: int) -> bytes:
    """The body. Raises Problem as soon as it is known to be too long."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 18 or int(said) > most):
        raise _too_long(most)
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > most:
            raise _too_long(most)
        parts.append(part)
    return b"".join(parts)


def _too_long(most: int) -> Problem:
    message = f"The body has more bytes than this server reads. Allowed: {most}."
    return Problem(413, message, code="body_too_large")


def fields(body: bytes) -> Fields:
    """The fields of a body. Raises Problem."""
    try:
        return Fields(json.loads(body, parse_constant=_refuse))
    except (ValueError, RecursionError):
        message = "The body is not JSON in UTF-8."
        raise Problem(400, message, code="invalid_json") from None


def _refuse(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is no JSON", "", 0)
