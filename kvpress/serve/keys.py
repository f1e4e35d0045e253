"""Who may ask: keys in a file, each of them a tenant of its own."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from kvpress.errors import ServingError
from kvpress.serve.problems import Problem

SHORTEST = 16  # characters of a key


class Keys:
    """The digests of the keys that are allowed; none: everybody may ask, as one tenant."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Of a file with one key on each line; lines that begin with # are none.

        Raises ServingError, which names lines and never keys.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(
                f"The API keys in {path} cannot be read: {type(error).__name__}. Give a text file"
                " with one key on each line."
            ) from None
        found: dict[str, int] = {}
        for number, line in enumerate(lines, 1):
            key = line.strip()
            if not key or key.startswith("#"):
                continue
            if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise ServingError(
                    f"The API key in line {number} of {path} is not allowed. Give at least"
                    f" {SHORTEST} characters of ASCII without spaces: openssl rand -hex 32."
                )
            if key in found:
                raise ServingError(
                    f"Lines {found[key]} and {number} of {path} hold the same API key. Give each"
                    " tenant one of its own."
                )
            found[key] = number
        if not found:
            raise ServingError(f"No API key is in {path}. Write one on each line.")
        return cls(tuple(found))

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._digests)

    def tenant(self, header: str | None) -> str:
        """Whose key it is, by a name that does not tell it. Raises Problem.

        header: `Authorization` as it was sent. All keys are compared, each in constant time, so
        that the time tells nothing of them.
        """
        if not self._digests:
            return ""
        scheme, _, key = (header or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        allowed = b""
        for digest in self._digests:
            if hmac.compare_digest(digest, given):
                allowed = digest
        if scheme.lower() != "bearer" or not allowed:
            message = "The API key is missing or wrong. Send it as Authorization: Bearer KEY."
            raise Problem(401, message, code="invalid_api_key")
        return allowed.hex()[:16]
