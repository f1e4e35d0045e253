"""Chats and tools as clients send them, made into what chat templates of tokenizers take."""

from __future__ import annotations

import json
from typing import Any

from kvpress.serve.fields import Fields, kind, whole_text
from kvpress.serve.problems import wrong

# The newer name of what templates know as the system's words.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
MOST_TOOLS = 128


def messages(given: list[Any] | None) -> list[dict[str, Any]]:
    """The turns of a chat. Raises Problem for what a template could not show."""
    if not given:
        raise wrong("messages", "messages must be a list of at least one message.", "missing")
    return [_message(Fields(each, f"messages[{place}]")) for place, each in enumerate(given)]


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.needed("role")
    if role not in ROLES:
        path = fields.path("role")
        raise wrong(path, f"{path} is unknown. Allowed: {', '.join(ROLES)}.")
    made: dict[str, Any] = {"role": ROLES[role]}
    content = _content(fields.any("content"), fields.path("content"))
    calls = fields.items("tool_calls")
    if calls:
        if role != "assistant":
            path = fields.path("tool_calls")
            raise wrong(path, f"{path}: only an assistant calls tools.")
        made["tool_calls"] = [
            _call(Fields(call, f"{fields.path('tool_calls')}[{place}]"))
            for place, call in enumerate(calls)
        ]
    elif content is None:
        path = fields.path("content")
        raise wrong(path, f"{path} is missing.", "missing")
    made["content"] = content or ""
    for name in ("name", "tool_call_id"):
        value = fields.text(name)
        if value is not None:
            made[name] = value
    fields.only("refusal", (), "this server has no refusals.")
    fields.only("audio", (), "the model reads text alone.")
    fields.nothing_else()
    return made


def _content(value: Any, path: str) -> str | None:
    """Text, or the joined texts of parts."""
    if value is None:
        return None
    if not isinstance(value, list):
        return whole_text(value, path)
    texts = []
    for place, each in enumerate(value):
        part = Fields(each, f"{path}[{place}]")
        if part.needed("type") != "text":
            raise wrong(part.path("type"), "The model reads text alone: give parts of type text.")
        texts.append(part.needed("text"))
        part.nothing_else()
    return "".join(texts)


def _call(fields: Fields) -> dict[str, Any]:
    """A call that an assistant made earlier; templates want its arguments as an object."""
    made: dict[str, Any] = {"type": "function"}
    ident = fields.text("id")
    if ident is not None:
        made["id"] = ident
    _is_function(fields)
    function = fields.part("function")
    if function is None:
        raise wrong(fields.path("function"), f"{fields.path('function')} is missing.", "missing")
    arguments = function.any("arguments")
    path = function.path("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(whole_text(arguments, path), path)
    if not isinstance(arguments, dict):
        raise wrong(path, f"{path} must be JSON of an object, not {kind(arguments)}.")
    _encodable(arguments, path)
    made["function"] = {"name": function.needed("name"), "arguments": arguments}
    function.nothing_else()
    fields.nothing_else()
    return made


def _parsed(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise wrong(path, f"{path} is not JSON.") from None


def tools(given: list[Any] | None) -> list[dict[str, Any]]:
    """The functions that a model may call, as a template shows them. Raises Problem."""
    if given and len(given) > MOST_TOOLS:
        raise wrong("tools", f"tools: {len(given)} are given. Allowed: up to {MOST_TOOLS}.")
    return [_tool(Fields(each, f"tools[{place}]")) for place, each in enumerate(given or [])]


def _tool(fields: Fields) -> dict[str, Any]:
    _is_function(fields)
    function = fields.part("function")
    if function is None:
        raise wrong(fields.path("function"), f"{fields.path('function')} is missing.", "missing")
    made: dict[str, Any] = {"name": function.needed("name")}
    described = function.text("description")
    if described is not None:
        made["description"] = described
    parameters = function.any("parameters")
    path = function.path("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong(path, f"{path} must be a JSON schema, not {kind(parameters)}.")
    _encodable(parameters, path)
    made["parameters"] = parameters or {"type": "object", "properties": {}}
    function.only("strict", (False,), "nothing makes the model keep to a schema.")
    function.nothing_else()
    fields.nothing_else()
    return {"type": "function", "function": made}


def _is_function(fields: Fields) -> None:
    if fields.text("type") not in (None, "function"):
        path = fields.path("type")
        raise wrong(path, f"{path} is not supported. Allowed: function.", "unsupported")


def _encodable(value: Any, path: str) -> None:
    """Raises Problem for text inside that no tokenizer could read."""
    whole_text(json.dumps(value, ensure_ascii=False), path)
