"""A request from its submission to its last token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from kvpress.batching.handle import Event, Handle
from kvpress.batching.request import Completion, Usage
from kvpress.serve.asked import Asked
from kvpress.serve.feed import Feed
from kvpress.serve.forms import DONE, Form, Said, event, usage
from kvpress.serve.problems import stopping
from kvpress.serve.reading import Part, Reading
from kvpress.serve.service import Service


class Answer:
    """All choices of one request. Whoever makes it must close it.

    usages: of the choices, once they are over.
    """

    def __init__(
        self, service: Service, asked: Asked, prompts: Sequence[tuple[int, ...]], tenant: str
    ) -> None:
        """Submits it. Raises what the batcher raises; then nothing of it runs."""
        self._texts, self.asked = service.texts, asked
        self._service = service
        self._handles = _submitted(service, asked, prompts, tenant)
        self._readings = [
            Reading(service.texts.decode, asked.stop, handle.request.ends)
            for handle in self._handles
        ]
        self._held: list[list[Part]] = [[] for _ in self._handles]
        self.usages = [Usage() for _ in self._handles]
        self.feed = Feed(self._handles)
        service.feeds.add(self.feed)

    def close(self) -> None:
        """Cancels what still runs, and forgets it."""
        self.feed.cancel()
        self._service.feeds.discard(self.feed)

    @property
    def usage(self) -> dict[str, Any]:
        """What it took."""
        recipe = self._handles[0].recipe  # with the budget that was asked for
        policy = self._service.batcher.policy if recipe is None else str(recipe)
        return usage(self.usages, self.asked.choices, policy)

    async def said(self) -> AsyncGenerator[Said, None]:
        """Its parts as they come. Raises the error that ended one of its choices."""
        running = len(self._handles)
        while running:
            for number, events in _by_choice(await self.feed.take()):
                said = await self._read(number, events)
                running -= said.reason is not None
                if said.text or said.drawn or said.reason or said.calls:
                    yield said

    async def whole(self) -> list[Said]:
        """All of it at once."""
        parts: list[list[Said]] = [[] for _ in self._handles]
        async for one in self.said():
            parts[one.choice].append(one)
        return [
            own[-1]._replace(
                text="".join(part.text for part in own),
                drawn=tuple(drawn for part in own for drawn in part.drawn),
            )
            for own in parts
        ]

    async def _read(self, number: int, events: Sequence[Event]) -> Said:
        """What one choice says by some events."""
        reading, parts, reason = self._readings[number], [], None
        for news in events:
            if news.error is not None:
                raise news.error
            if reading.stopped and news.drawn:
                self._handles[number].cancel()  # the batcher has not seen the stop text
            parts.append(reading.add(news.drawn))
            if news.completion is not None:
                parts.append(reading.finish())
                self.usages[number] = news.completion.usage
                reason = self._reason(number, news.completion)
        if self.asked.tools and self._texts.parses:
            self._held[number] += parts
            if reason is None:
                return Said(number, "")
            return await self._parsed(number, reason)
        return _joined(number, parts, reason)

    async def _parsed(self, number: int, reason: str) -> Said:
        """A whole choice, with the calls of tools that are in it."""
        said, reading = _joined(number, self._held[number], reason), self._readings[number]
        if reading.stopped:
            return said
        prefix, tools = self._handles[number].request.ids, self.asked.tools
        turn = await self._texts.run(lambda: self._texts.parse(reading.tokens, prefix, tools))
        if turn is None or not turn.calls:
            return said
        return said._replace(text=turn.text, calls=turn.calls, reason="tool_calls")

    def _reason(self, number: int, completion: Completion) -> str:
        if self._readings[number].stopped:
            return "stop"
        if completion.reason == "cancelled":  # by nobody who waits for it
            raise stopping()
        return completion.reason


def _submitted(
    service: Service, asked: Asked, prompts: Sequence[tuple[int, ...]], tenant: str
) -> list[Handle]:
    """The handles of all choices, in their order. Each has a seed of its own."""
    handles: list[Handle] = []
    most = [service.limits.new_tokens(len(ids), asked.most_new) for ids in prompts]
    try:
        for ids, most_new in zip(prompts, most, strict=True):
            for _ in range(asked.choices):
                seed = asked.sampling.seed
                own = None if seed is None else seed + len(handles)
                handle = service.batcher.submit(
                    ids,
                    max_new_tokens=most_new,
                    sampling=replace(asked.sampling, seed=own),
                    stop=asked.stop,
                    budget=asked.budget,
                    tenant=tenant,
                    timeout=service.limits.timeout,
                )
                handles.append(handle)
    except BaseException:
        for handle in handles:
            handle.cancel()
        raise
    return handles


def _by_choice(events: Sequence[tuple[int, Event]]) -> list[tuple[int, list[Event]]]:
    """The events of each choice: what came while a reader was slow goes out as one part."""
    found: dict[int, list[Event]] = {}
    for number, one in events:
        found.setdefault(number, []).append(one)
    return list(found.items())


def _joined(number: int, parts: Sequence[Part], reason: str | None) -> Said:
    drawn = tuple(one for part in parts for one in part.drawn)
    return Said(number, "".join(part.text for part in parts), drawn, reason=reason)


async def prepared(service: Service, asked: Asked, tenant: str) -> Answer:
    """The answer to a request, submitted. Raises Problem and what the batcher raises."""
    texts, chat = service.texts, asked.chat
    if chat is not None:
        prompts = [await texts.run(lambda: texts.chat_ids(chat, asked.tools))]
    else:
        prompts = await texts.run(lambda: [texts.ids(prompt) for prompt in asked.prompts])
    service.check_open()  # reading a long prompt takes its time
    return Answer(service, asked, prompts, tenant)


async def streamed(answer: Answer, form: Form) -> AsyncGenerator[bytes, None]:
    """The events of a stream. Raises the error that ends it."""
    told = answer.asked.include_usage
    none: dict[str, Any] = {"usage": None} if told else {}
    if form.chat:
        for choice in range(len(answer.usages)):
            yield event(form.chunk([form.opening(choice)], **none))
    async for said in answer.said():
        yield b"".join(event(form.chunk([piece], **none)) for piece in form.pieces(said))
        await asyncio.sleep(0)  # others may go on, however fast the tokens come
    if told:
        yield event(form.chunk([], usage=answer.usage))
    yield DONE
