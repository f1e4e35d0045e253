"""The command line of the server: `kvpress serve`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpress.bench.common.command import command
from kvpress.bench.common.options import GPU, HubOptions, split_device, use_threads
from kvpress.bench.run.commands import POLICIES
from kvpress.errors import ServingError

if TYPE_CHECKING:
    from kvpress.bench.common.models import Source
    from kvpress.serve.contract import Batcher
    from kvpress.serve.keys import Keys
    from kvpress.serve.service import Service

NEEDED = ("starlette", "uvicorn", "prometheus_client")
OWN = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class HeldOptions(HubOptions):
    """Which model, and how many bytes of keys and values are held where."""

    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, …: weights are loaded onto it. A size is the most that keys and values"
            " of all requests take there: 8GiB, or both: cuda,8GiB.",
            show_default=GPU,
        ),
    ] = None
    host_bytes: Annotated[
        str | None,
        typer.Option(
            help="The most that waiting requests take of the host's memory: 16GiB.",
            show_default="none",
        ),
    ] = None
    disk: Annotated[
        str | None,
        typer.Option(
            help="The most that they take on disk, and the folder: 20GiB:folder.",
            show_default="none",
        ),
    ] = None

    @property
    def source(self) -> Source:
        """Where the model comes from."""
        return self.source_at(split_device(self.device)[0])

    @property
    def caps(self) -> dict[str, str | None]:
        """What the batcher takes."""
        return {"device": split_device(self.device)[1], "host": self.host_bytes, "disk": self.disk}


@dataclass(frozen=True, kw_only=True)
class AddressOptions:
    """Where it listens, and to whom."""

    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8000
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model.", show_default="as --model calls it"),
    ] = None
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="A text file with an API key on each line, one for each tenant.",
            show_default="no key is needed",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """How much is served, by how many, and how long."""

    replicas: Annotated[
        str | None,
        typer.Option(
            help="Processes that hold the model each, on Ray: 4, or as many as the work asks for:"
            " 1-4. --device, --host-bytes, --disk, --threads and --most-… are of each.",
            show_default="none: this process holds it",
        ),
    ] = None
    chunk: Annotated[int, typer.Option(help="Tokens of a prompt read at once.", min=16)] = 512
    most_running: Annotated[int, typer.Option(help="Requests served side by side.", min=1)] = 256
    most_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; more are refused.", min=1)
    ] = 1024
    most_context: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt and its answer.", show_default="the model's", min=16),
    ] = None
    most_new: Annotated[
        int | None,
        typer.Option(help="Tokens of an answer.", show_default="the batcher's", min=1),
    ] = None
    timeout: Annotated[
        float, typer.Option(help="Seconds of a request, and to wait for a slow reader.", min=1)
    ] = 600.0
    drain: Annotated[
        float, typer.Option(help="Seconds in which requests may end after SIGTERM.", min=0)
    ] = 30.0

    @property
    def of_batcher(self) -> dict[str, int]:
        """What the batcher takes."""
        given = {
            "chunk": self.chunk,
            "most_running": self.most_running,
            "most_waiting": self.most_waiting,
            "most_context": self.most_context,
            "most_new": self.most_new,
        }
        return {name: value for name, value in given.items() if value is not None}


@command("kvpress serve --model demo --policy NAME:budget=0.5 --device 2GiB --port 8000")
def serve(
    loading: HeldOptions,
    address: AddressOptions,
    limits: LimitOptions,
    policy: Annotated[
        str, typer.Option(help="name:key=value,… ; kvpress policies lists them.")
    ] = POLICIES[0],
) -> None:
    """Serve a model to many users over HTTP, as OpenAI's clients ask for it.

    It stays on this machine unless --host says otherwise; then give --api-key-file, and put a proxy
    with TLS before it. SIGTERM ends it once the requests that run are over.
    """
    from kvpress.policy.loading import parse

    _check_packages(limits.replicas)
    parse(policy)  # refuse a wrong policy, a wrong key or a port in use before a model is loaded
    keys = _keys(address)
    bound = _bound(address)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would fight the model's
    _log_to_stderr()
    log = logging.getLogger("kvpress.serve")
    log.info("loading %s", loading.model)
    batcher, tokenizer = loaded(loading, policy, limits)
    name = address.name or loading.model
    if address.name is None and Path(loading.model).is_dir():
        name = Path(loading.model).resolve().name  # clients need not know folders
    service = made_service(batcher, tokenizer, name, keys, limits)

    from kvpress.serve.running import run

    host, port = bound.getsockname()[:2]
    log.info("serving %s with %s on %s port %s", name, policy, host, port)
    run(service, bound, limits.drain)


def loaded(loading: HeldOptions, policy: str, limits: LimitOptions) -> tuple[Batcher, Any]:
    """The batcher, of one model or of its replicas, and the tokenizer."""
    options = {**loading.caps, **limits.of_batcher}
    if limits.replicas is None:
        use_threads(loading.threads)
        model, tokenizer = loading.source.load()
        return made_batcher(model, tokenizer, policy, **options), tokenizer

    from kvpress.serve.replicas.making import counts, made_fleet
    from kvpress.serve.replicas.plan import Plan

    plan = Plan(loading.source, policy, options, loading.threads)
    return made_fleet(plan, counts(limits.replicas))


def made_batcher(model: Any, tokenizer: Any, policy: str, **options: Any) -> Batcher:
    """The batcher over a loaded model. options: caps and limits; None: its own default."""
    found = importlib.import_module("kvpress.batching.batcher").Batcher
    given = {name: value for name, value in options.items() if value is not None}
    made: Batcher = found(model, policy, tokenizer=tokenizer, **given)
    return made


def made_service(
    batcher: Batcher, tokenizer: Any, name: str, keys: Keys, limits: LimitOptions
) -> Service:
    """What is served over HTTP: the stricter limits of the command line and of the batcher."""
    from kvpress.serve.metrics import Metrics
    from kvpress.serve.service import Limits, Service
    from kvpress.serve.texts import Texts, vocabulary

    context = min(limits.most_context or batcher.most_context, batcher.most_context)
    new = min(limits.most_new or batcher.most_new, batcher.most_new)
    return Service(
        batcher=batcher,
        texts=Texts(tokenizer, vocabulary(batcher.model)),
        limits=Limits(context, new, limits.timeout),
        name=name,
        metrics=Metrics(batcher),
        keys=keys,
    )


def _check_packages(replicas: str | None = None) -> None:
    """Raises ServingError where a package of the extra is missing, or replicas cannot be."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ServingError(
            f"kvpress serve needs {', '.join(missing)}: pip install 'kvpress-engine[serve]'."
        )
    if replicas is not None:
        from kvpress.serve.replicas.making import counts

        counts(replicas)


def _keys(address: AddressOptions) -> Keys:
    """Those of the file; without one where others can reach the server, a warning."""
    from kvpress.serve.keys import Keys

    if address.api_key_file is not None:
        return Keys.read(address.api_key_file)
    if address.host not in OWN:
        sys.stderr.write(
            f"Warning: everybody who reaches {address.host} can use this model. Give"
            " --api-key-file, or --host 127.0.0.1.\n"
        )
    return Keys()


def _bound(address: AddressOptions) -> socket.socket:
    """Raises ServingError where nobody can listen."""
    from kvpress.serve.running import listening

    try:
        return listening(address.host, address.port)
    except OSError as error:
        raise ServingError(
            f"--host {address.host} --port {address.port} cannot be listened on: {error.strerror}."
            " Give another address, or end what uses it."
        ) from error


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("kvpress.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if name == "kvpress.serve" else logging.WARNING)
