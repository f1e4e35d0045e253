"""What can go wrong with a request, in the form that OpenAI's clients read."""

from __future__ import annotations

import math
from typing import Any

from kvpress.errors import (
    BudgetError,
    DeadlineError,
    InputError,
    KVPressError,
    PolicyError,
    RefusedError,
    ServingError,
    TooLargeError,
)
from kvpress.serve.replicas.wire import Lost

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
LONGEST_WAIT = 60  # seconds that a client is asked to wait at most


class Problem(KVPressError):
    """An answer that is an error. param: the field that is wrong. retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = TYPES.get(self.status, "server_error")
        said = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": said}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it: when to come again, or that there is no use in that."""
        if self.retry_after is not None:
            wait = min(max(math.ceil(self.retry_after), 1), LONGEST_WAIT)
            return {"retry-after": str(wait)}
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        # Clients repeat what failed with 5xx by themselves; what took too long once would again.
        return {"x-should-retry": "false"} if self.status in (500, 504) else {}


def wrong(param: str, message: str, code: str = "invalid_value") -> Problem:
    """A field that cannot be answered as it was meant."""
    return Problem(400, message, param=param, code=code)


def stopping() -> Problem:
    """Nothing is taken any more."""
    return Problem(
        503, "The server is shutting down. Try another one.", code="draining", retry_after=5
    )


def dead() -> Problem:
    """The model's thread has ended; only a new process helps."""
    message = "The model of this server has stopped. Its operator must restart it."
    return Problem(503, message, code="unavailable")


def restarting() -> Problem:
    """No replica serves; they are started again without anybody's help."""
    message = "No replica of the model serves just now. They are being started; come again."
    return Problem(503, message, code="unavailable", retry_after=10)


def failed(ident: str) -> Problem:
    """Something that nobody expected. ident: what the log calls it."""
    message = f"The server failed. Its log says more under {ident}."
    return Problem(500, message, code="internal_error")


def of(error: BaseException, ident: str, alive: bool = True) -> Problem:
    """What a client is told of an error.

    Only messages that are about limits and options are passed on: others may quote a prompt.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, RefusedError):
        wait = error.retry_after
        return Problem(429, str(error), code="queue_full", retry_after=wait)
    if isinstance(error, TooLargeError):
        return Problem(413, str(error), code="context_length_exceeded")
    if isinstance(error, DeadlineError):
        return Problem(504, str(error), code="deadline_exceeded")
    if isinstance(error, (BudgetError, PolicyError)):
        return wrong("kvpress", str(error), "invalid_budget")
    if isinstance(error, InputError):
        return Problem(400, "The model cannot take this prompt.", code="invalid_prompt")
    if isinstance(error, Lost):
        return Problem(503, str(error), code="replica_lost")
    if not alive:
        return dead()
    if isinstance(error, ServingError):
        message = f"The request was not served to its end. The log says more under {ident}."
        return Problem(503, message, code="unavailable")
    return failed(ident)
