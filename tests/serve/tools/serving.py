"""A server in a thread on a free port, and what clients of it need."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import httpx
from scripted import Batcher
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from kvpress.serve.keys import Keys
from kvpress.serve.metrics import Metrics
from kvpress.serve.running import Server, listening
from kvpress.serve.service import Limits, Service
from kvpress.serve.texts import Texts, vocabulary

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'nobody' or m['content'] == 'REFUSE' %}"
    "{{ raise_exception('secret ' + m['content']) }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}"
    "{% endif %}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, one that ends texts, and a template for chats with tools."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken("<|end|>", special=True)])
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


class Running(NamedTuple):
    """A server that runs."""

    url: str
    port: int
    batcher: Batcher
    service: Service
    server: Server

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """An answer to JSON, or to bytes as they are."""
        given = {"content": body} if isinstance(body, bytes) else {"json": body}
        with httpx.Client(timeout=30, trust_env=False) as client:
            return client.post(self.url + path, headers=headers, **given)

    def get(self, path: str, **headers: str) -> httpx.Response:
        """An answer."""
        with httpx.Client(timeout=30, trust_env=False) as client:
            return client.get(self.url + path, headers=headers)

    def chat(self, text: str = "Hello", **more: Any) -> httpx.Response:
        """An answer to a chat of one turn."""
        return self.post("/v1/chat/completions", chat(text, **more))

    def raw(self, body: Mapping[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
        """A connection on which a request was sent, whose client reads little at a time."""
        found = socket.socket()
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        found.settimeout(20)
        found.connect(("127.0.0.1", self.port))
        found.sendall(request(body, path))
        return found


def chat(text: str = "Hello", **more: Any) -> dict[str, Any]:
    """The body of a chat of one turn."""
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def request(body: Mapping[str, Any], path: str = "/v1/chat/completions") -> bytes:
    """A whole request as it is sent."""
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(text)}\r\n\r\n"
    return head.encode() + text


@contextlib.contextmanager
def serving(
    batcher: Batcher,
    tokenizer: Any,
    *,
    timeout: float = 60.0,
    keys: tuple[str, ...] = (),
    send_buffer: int | None = None,
) -> Iterator[Running]:
    """A server over a batcher; both end with it."""
    limits = Limits(batcher.most_context, batcher.most_new, timeout)
    texts = Texts(tokenizer, vocabulary(batcher.model))
    service = Service(batcher, texts, limits, "tiny", Metrics(batcher), Keys(keys))
    server, bound = Server(service, 5.0), listening("127.0.0.1", 0)
    if send_buffer is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = bound.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        eventually(lambda: server.started)
        yield Running(f"http://127.0.0.1:{port}", port, batcher, service, server)
    finally:
        server.should_exit = True
        thread.join()
        batcher.close()


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until something holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"it does not hold after {seconds} s"
        time.sleep(0.01)


def events(text: str) -> list[Any]:
    """What a stream says; its end is the text [DONE]."""
    found = [part for part in text.split("\n\n") if part]
    data = [part[part.index("data: ") + 6 :] for part in found]
    return [one if one == "[DONE]" else json.loads(one) for one in data]
