"""Responses: JSON, errors, and streams that end when their reader leaves or takes nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvpress.errors import KVPressError
from kvpress.serve.feed import Feed
from kvpress.serve.forms import dumped, event
from kvpress.serve.problems import Problem

_Made = TypeVar("_Made")
LEFT = 499  # what the log calls a request whose client has left
STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # proxies pass on what they have
}


class Gone(KVPressError):
    """The client has left."""


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in one piece."""
    return Response(dumped(value), status, dict(headers or {}), "application/json")


def as_error(problem: Problem) -> Response:
    """An answer that is an error."""
    return as_json(problem.body, problem.status, problem.headers)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, _Made]) -> _Made:
    """What a coroutine makes; it is cancelled when the client leaves. Raises Gone.

    The body must have been read.
    """
    making, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if making.done():
            return making.result()
        raise Gone("The client has left.")
    finally:
        await _ended(making, leaving)


async def _left(receive: Receive) -> None:
    """Waits until the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


class Stream(Response):
    """Events as they come.

    to_problem: what the client is told of an error. over: called at the end with a status: 200, 499
    where the client has left or takes nothing, otherwise that of the error.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        feed: Feed,
        to_problem: Callable[[BaseException], Problem],
        over: Callable[[int], None],
    ) -> None:
        super().__init__(headers=STREAM)
        del self.headers["content-length"]
        self._events, self._feed = events, feed
        self._to_problem, self._over = to_problem, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes it until it ends, the client leaves, or is given up."""
        pump = asyncio.create_task(self._pump(send))
        others = [
            asyncio.create_task(_left(receive)),
            asyncio.create_task(_given_up(self._feed)),
        ]
        status = LEFT
        try:
            await asyncio.wait({pump, *others}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                status = pump.result()
        finally:
            self._over(status)
            await _ended(pump, *others)

    async def _pump(self, send: Send) -> int:
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        status = 200
        try:
            async with contextlib.aclosing(self._events) as events:
                async for part in events:
                    await self._write(send(_body(part)))
        except Exception as error:
            problem = self._to_problem(error)
            status = problem.status
            await self._write(send(_body(event(problem.body, "error"))))
        await self._write(send({"type": "http.response.body", "body": b"", "more_body": False}))
        return status

    async def _write(self, sending: Awaitable[None]) -> None:
        """Waits for the client, and lets it be known how long."""
        self._feed.writing(True)
        await sending
        self._feed.writing(False)


def _body(part: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": part, "more_body": True}


async def _given_up(feed: Feed) -> None:
    await feed.given_up.wait()
