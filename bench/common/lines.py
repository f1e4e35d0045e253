"""Another process that answers requests: a line of JSON each way."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvpress.errors import KVPressError


class OtherError(KVPressError, RuntimeError):
    """Another process failed, or ended."""


class Other:
    """A process that answers requests. It ends with this object, or when it is closed.

    Args: name: in messages. command: what runs. environment: variables, all of them; None: ours.
    error: the exception, which says what failed.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        error: type[OtherError] = OtherError,
    ) -> None:
        self.name, self._error = name, error
        self._files = tempfile.TemporaryDirectory()
        self._log = self.file("log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=None if environment is None else dict(environment),
            )
        self._end = weakref.finalize(self, _end, self._process, self._files)

    def file(self, name: str) -> Path:
        """A path in a folder that goes with the process."""
        return Path(self._files.name, name)

    def request(self, **what: Any) -> dict[str, Any]:
        """The reply to a request. Raises the error."""
        assert self._process.stdin is not None and self._process.stdout is not None, "it has pipes"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text().strip().rpartition("\n")[2]
            raise self._error(f"{self.name}: its process ended: {last}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._error(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Ends the process."""
        self._end()


def _end(process: subprocess.Popen[str], files: tempfile.TemporaryDirectory[str]) -> None:
    with process:
        process.kill()
    files.cleanup()
