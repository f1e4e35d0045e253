"""The process: its options, what it refuses before a model is loaded, and how it ends."""

from __future__ import annotations

import contextlib
import importlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from scripted import Batcher
from serving import chat, events, eventually, serving
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.errors import KVPressError, ServingError
from kvpress.serve import command, running
from kvpress.serve.keys import Keys

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "tools" / "process.py"


@contextlib.contextmanager
def process(drain: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own, and its address."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), str(drain)], stdout=pipe, stderr=pipe, text=True
    ) as started:
        try:
            assert started.stdout is not None
            url = f"http://127.0.0.1:{started.stdout.readline().strip()}"
            yield started, url
        finally:
            started.kill()


def test_sigterm_lets_requests_end_refuses_others_and_cancels_what_takes_too_long() -> None:
    with process(4.0) as (server, url), httpx.Client(timeout=30, trust_env=False) as client:
        found: dict[int, str] = {}

        def stream(seed: int) -> None:
            body = chat(stream=True, seed=seed)
            found[seed] = httpx.post(
                f"{url}/v1/chat/completions", json=body, timeout=30, trust_env=False
            ).text

        sizes = [100 + number for number in range(10)] + [2000]  # the last takes 20 s
        threads = [threading.Thread(target=stream, args=(size,)) for size in sizes]
        for thread in threads:
            thread.start()

        def taken() -> bool:  # by the batcher, whether they still run or not
            page = client.get(f"{url}/metrics").text
            counts = re.findall(r"requests_(?:running|total)\{[^}]*\} (\d+)", page)
            return sum(map(int, counts)) == len(sizes)

        eventually(taken, 60.0)
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        while client.get(f"{url}/ready").status_code != 503:
            time.sleep(0.01)
        refused = client.post(f"{url}/v1/chat/completions", json=chat())
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert client.get(f"{url}/health").status_code == 200
        for thread in threads:
            thread.join()
        assert server.wait(20) == 0
        assert 3.0 < time.monotonic() - began < 20
    for size in sizes[:-1]:
        stream_ = events(found[size])
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in stream_[:-1])
        assert text == "x" * size and stream_[-1] == "[DONE]"
    last = events(found[2000])
    assert last[-1]["error"]["code"] == "draining"


def test_a_second_signal_ends_it_at_once(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer, lambda asked: "x" * 4000, pace=0.01)
    with serving(batcher, tokenizer) as server, server.raw(chat(stream=True)):
        eventually(lambda: bool(batcher.handles))
        server.server.handle_exit(signal.SIGINT, None)
        assert not server.server.should_exit  # it would drain for 5 s
        server.server.handle_exit(signal.SIGINT, None)
        eventually(lambda: not server.service.feeds)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "No API key"),
        ("# nothing\n\n", "No API key"),
        ("short\n", "line 1"),
        ("# one\n" + "a" * 32 + "\n" + "a" * 32, "Lines 2 and 3"),
        ("a" * 20 + " " + "b" * 20, "line 1"),
        ("ü" * 20, "line 1"),
    ],
)
def test_files_of_keys_are_checked_and_never_quoted(tmp_path: Path, lines: str, said: str) -> None:
    file = tmp_path / "keys"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(ServingError, match=said) as error:
        Keys.read(file)
    assert "aaaa" not in str(error.value) and "short" not in str(error.value)


def test_a_file_of_keys_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="cannot be read"):
        Keys.read(tmp_path / "none")


class Loaded:
    """What stands for a model that was loaded, and for the server that would run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.served: list[Any] = []
        module = ModuleType("kvpress.batching.batcher")

        def batcher(model: Any, policy: str, **options: Any) -> Batcher:
            self.made.append((model, policy, options))
            return Batcher(tokenizer)

        vars(module)["Batcher"] = batcher
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(
            "kvpress.bench.common.models.Source.load", lambda source: (source, tokenizer)
        )
        monkeypatch.setattr(running, "run", self._run)

    def _run(self, service: Any, bound: socket.socket, drain: float) -> None:
        self.served.append((service, bound.getsockname(), drain))
        bound.close()
        service.batcher.close()
        service.texts.close()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> Loaded:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(command, "_log_to_stderr", lambda: None)
    return Loaded(monkeypatch, tokenizer)


def test_the_command_makes_a_batcher_and_a_service_of_its_options(
    loaded: Loaded, tmp_path: Path, tokenizer: Any
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k" * 32)
    given = "serve --model some/model --device cpu,8GiB --host-bytes 2GiB --disk 1GiB:folder"
    given += " --port 0 --chunk 128 --most-running 7 --most-waiting 9 --most-context 1000"
    given += f" --most-new 100 --timeout 5 --drain 2 --name mine --api-key-file {keys}"
    result = CliRunner().invoke(app, given.split())
    assert result.exit_code == 0, result.output
    ((source, policy, options),) = loaded.made
    assert (source.name, source.device, policy) == ("some/model", "cpu", "full")
    assert options == {
        "tokenizer": tokenizer,
        "device": "8GiB",
        "host": "2GiB",
        "disk": "1GiB:folder",
        "chunk": 128,
        "most_running": 7,
        "most_waiting": 9,
        "most_context": 1000,
        "most_new": 100,
    }
    ((service, address, drain),) = loaded.served
    limits = service.limits
    assert (limits.most_context, limits.most_new, limits.timeout, drain) == (1000, 100, 5.0, 2.0)
    assert service.name == "mine" and service.keys and address[0] == "127.0.0.1"
    assert "Warning" not in result.output


def test_an_address_that_others_reach_is_warned_about(loaded: Loaded) -> None:
    result = CliRunner().invoke(
        app, ["serve", "--host", "0.0.0.0", "--port", "0", "--model", "tiny"]
    )
    assert result.exit_code == 0 and "everybody who reaches 0.0.0.0" in result.output
    ((service, _, _),) = loaded.served
    assert service.limits.most_context == Batcher.most_context and not service.keys


def test_a_folder_is_called_by_its_last_name(loaded: Loaded, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    CliRunner().invoke(app, ["serve", "--port", "0", "--model", str(folder)])
    ((service, _, _),) = loaded.served
    assert service.name == "my-model"


def test_mistakes_are_refused_before_a_model_is_loaded(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        for words, said in (
            (["--port", str(port)], "cannot be listened on"),
            (["--policy", "no_such_policy"], "no_such_policy"),
            (["--api-key-file", "no-such-file"], "cannot be read"),
        ):
            result = CliRunner().invoke(app, ["serve", *words])
            assert isinstance(result.exception, KVPressError) and said in str(result.exception)
    monkeypatch.setattr(command, "NEEDED", ("starlette", "no_such_package"))
    result = CliRunner().invoke(app, ["serve"])
    assert "pip install 'kvpress-engine[serve]'" in str(result.exception)
    assert "no_such_package" in str(result.exception) and not loaded.made


def test_without_the_extra_the_command_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in command.NEEDED:
        monkeypatch.setitem(sys.modules, name, None)
    again = importlib.reload(command)
    assert again.serve.example.startswith("kvpress serve")


def test_nothing_else_imports_what_the_extra_brings() -> None:
    trees = [ROOT / tree for tree in ("kvpress", "bench", "policies", "csrc")]
    for path in (path for tree in trees for path in tree.rglob("*.py")):
        uses = re.search(
            rf"^\s*(from|import) ({'|'.join(command.NEEDED)})\b", path.read_text("utf-8"), re.M
        )
        assert not uses or path.parent == ROOT / "kvpress" / "serve", path
