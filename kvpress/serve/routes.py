"""What answers each path."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from kvpress.serve import asked, bodies, problems
from kvpress.serve.answering import Answer, prepared, streamed
from kvpress.serve.fields import Fields
from kvpress.serve.forms import Form
from kvpress.serve.messages import messages, tools
from kvpress.serve.problems import Problem, wrong
from kvpress.serve.replies import LEFT, Stream, as_json, unless_gone
from kvpress.serve.service import Service

log = logging.getLogger("kvpress.serve")
MODELS = "/v1/models"


@dataclass
class Call:
    """A request over HTTP. ident: ours. began: monotonic seconds. tenant: whose key it has."""

    request: Request
    ident: str
    began: float
    tenant: str = ""


Route = tuple[str, Callable[[Call], Awaitable[Response]], bool]


class Routes:
    """All paths: the method, the answer, and whether a key is needed."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.all: dict[str, Route] = {
            "/v1/chat/completions": ("POST", self._chat, True),
            "/v1/completions": ("POST", self._completion, True),
            MODELS: ("GET", self._models, True),
            "/tokenize": ("POST", self._tokenize, True),
            "/health": ("GET", self._health, False),
            "/ready": ("GET", self._ready, False),
            "/metrics": ("GET", self._metrics, False),
        }

    def known(self, path: str) -> bool:
        """Whether it may be written into a log: others hold whatever a client likes."""
        return path in self.all

    async def _chat(self, call: Call) -> Response:
        return await self._generate(call, True)

    async def _completion(self, call: Call) -> Response:
        return await self._generate(call, False)

    async def _generate(self, call: Call, chat: bool) -> Response:
        service, request = self._service, call.request
        service.check_open()
        read, policy = asked.chat if chat else asked.completion, service.batcher.policy
        wanted = await self._read(call, lambda fields: read(fields, policy))
        service.check_model(wanted.model)
        form = Form(
            call.ident, int(time.time()), service.name, chat, wanted.told, service.texts.token
        )
        if wanted.stream:
            answer = await unless_gone(request.receive, prepared(service, wanted, call.tenant))
            return self._stream(call, answer, form)
        body = await unless_gone(request.receive, self._whole(call, wanted, form))
        return as_json(body)

    async def _read(self, call: Call, check: Callable[[Fields], Any]) -> Any:
        """A body, checked; apart from the loop, because a long one takes its time."""
        most = bodies.most_bytes(self._service.limits.most_context)
        body = await bodies.read(call.request, most)
        return await self._service.texts.run(lambda: check(bodies.fields(body)))

    async def _whole(self, call: Call, wanted: asked.Asked, form: Form) -> dict[str, Any]:
        answer = await prepared(self._service, wanted, call.tenant)
        try:
            said = await answer.whole()
        finally:
            answer.close()
        self._note(call, 200, answer)
        return form.whole(said, answer.usage)

    def _stream(self, call: Call, answer: Answer, form: Form) -> Response:
        def to_problem(error: BaseException) -> Problem:
            problem = problems.of(error, call.ident, self._service.alive)
            if problem.status == 500:
                log.error("%s failed: %s", call.ident, type(error).__name__)
            return problem

        def over(status: int) -> None:
            answer.close()
            if status == LEFT:
                self._service.metrics.left()
            self._note(call, status, answer)

        return Stream(streamed(answer, form), answer.feed, to_problem, over)

    def _note(self, call: Call, status: int, answer: Answer) -> None:
        usage, path = answer.usage, call.request.scope["path"]
        seconds = time.monotonic() - call.began
        sizes = usage["prompt_tokens"], usage["completion_tokens"]
        said = "%s %s %s in %.3f s: %s tokens read, %s drawn"
        log.info(said, call.ident, path, status, seconds, *sizes)

    async def _models(self, call: Call) -> Response:
        service, path = self._service, call.request.scope["path"]
        limits = service.limits
        model = {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "kvpress",
            "max_model_len": limits.most_context,
            "kvpress": {"policy": service.batcher.policy, "most_new": limits.most_new},
        }
        if path == MODELS:
            return as_json({"object": "list", "data": [model]})
        service.check_model(path.removeprefix(f"{MODELS}/"))
        return as_json(model)

    async def _tokenize(self, call: Call) -> Response:
        service = self._service
        service.check_open()

        def counted(fields: Fields) -> tuple[str | None, tuple[int, ...]]:
            model, chat = fields.text("model"), fields.items("messages")
            functions, prompt = tools(fields.items("tools")), fields.text("prompt")
            fields.nothing_else()
            if (chat is None) == (prompt is None):
                raise wrong("prompt", "Give either prompt or messages.")
            if prompt is not None:
                return model, service.texts.ids(prompt)
            return model, service.texts.chat_ids(messages(chat), functions)

        model, ids = await self._read(call, counted)
        if model is not None:
            service.check_model(model)
        most = service.limits.most_context
        return as_json({"tokens": ids, "count": len(ids), "max_model_len": most})

    async def _health(self, call: Call) -> Response:
        service = self._service
        healthy = await asyncio.to_thread(lambda: service.healthy)
        said: dict[str, Any] = {"status": "ok" if healthy else "dead"}
        said |= {"model": service.name, "policy": service.batcher.policy}
        replicas = service.replicas
        if replicas is not None:
            said["replicas"] = {"alive": replicas.alive, "starting": replicas.starting}
            if healthy and replicas.starting:
                said["status"] = "degraded"  # others serve meanwhile
        return as_json(said, 200 if healthy else 503)

    async def _ready(self, call: Call) -> Response:
        if self._service.draining:
            return as_json({"status": "draining"}, 503)
        alive = self._service.alive
        return as_json({"status": "ready" if alive else "dead"}, 200 if alive else 503)

    async def _metrics(self, call: Call) -> Response:
        page = await asyncio.to_thread(self._service.metrics.page)
        return Response(page, media_type=CONTENT_TYPE_LATEST)
