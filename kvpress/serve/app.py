"""The application: routes, keys, ids and errors; nothing else answers, and nothing is mounted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvpress.serve import problems
from kvpress.serve.problems import Problem
from kvpress.serve.replies import LEFT, Gone, as_error
from kvpress.serve.routes import MODELS, Call, Routes
from kvpress.serve.service import Service

log = logging.getLogger("kvpress.serve")
LOOK_EVERY = 0.2  # seconds between looks at the batcher and at slow readers
LONGEST_ID = 64


class App:
    """An ASGI application over a service."""

    def __init__(self, service: Service) -> None:
        self._service, self._routes = service, Routes(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or lives as long as the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            # A client's id is never a key: two of them may be the same.
            call = Call(Request(scope, receive), uuid.uuid4().hex, time.monotonic())
            response = await self._response(call)
            response.headers["x-request-id"] = echoed(call.request) or call.ident
            await response(scope, receive, send)

    async def _response(self, call: Call) -> Response:
        path = call.request.scope["path"]
        try:
            response = await self._route(call)(call)
        except (Gone, ClientDisconnect):
            self._service.metrics.left()
            response = Response(status_code=LEFT)
        except Exception as error:
            problem = problems.of(error, call.ident, self._service.alive)
            if problem.status in (400, 401, 404, 405, 413):
                self._service.metrics.invalid()
            if problem.status == 500:
                note(error, call.ident)
            response = as_error(problem)
        if response.status_code != 200:
            shown = path if self._routes.known(path) else "another path"
            log.info("%s %s %s", call.ident, shown, response.status_code)
        return response

    def _route(self, call: Call) -> Callable[[Call], Awaitable[Response]]:
        """What answers a path. Raises Problem."""
        path, method = call.request.scope["path"], call.request.method
        if path.startswith(f"{MODELS}/"):
            path = MODELS
        route = self._routes.all.get(path)
        if route is None:
            allowed = ", ".join(self._routes.all)
            raise Problem(404, f"There is nothing here. There is: {allowed}.", code="unknown_url")
        wanted, answer, guarded = route
        if method != wanted and not (method == "HEAD" and wanted == "GET"):
            raise Problem(405, f"{path} takes {wanted}.", code="method_not_allowed")
        if guarded:
            call.tenant = self._service.keys.tenant(call.request.headers.get("authorization"))
        return answer

    async def _live(self, receive: Receive, send: Send) -> None:
        """Looks after the service while the server runs."""
        await receive()
        looking = asyncio.create_task(self._look())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await looking
        self._service.texts.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                self._service.look_after(time.monotonic())
            except Exception as error:  # the next look must come
                note(error, "looking after requests")


def echoed(request: Request) -> str:
    """A client's own id of its request, as far as it is harmless."""
    given = request.headers.get("x-request-id", "")
    return re.sub(r"[^A-Za-z0-9._-]", "", given[: 4 * LONGEST_ID])[:LONGEST_ID]


def note(error: BaseException, ident: str) -> None:
    """Logs what failed and where, without its message, which may quote a prompt."""
    places = traceback.extract_tb(error.__traceback__)[-6:]
    where = " < ".join(f"{place.name}:{place.lineno}" for place in reversed(places))
    log.error("%s failed: %s in %s", ident, type(error).__name__, where)
