"""Ray: that it is there, where it runs, and which share of it an actor gets."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

from kvpress.bench.shards.errors import ShardError

ADDRESS = "RAY_ADDRESS"
_STORE = 80 * 2**20  # bytes of a local Ray's object store: results are small
# Nothing is reported to others, and older versions do not warn of what changed.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Share(NamedTuple):
    """What an actor gets: CPU threads, as many of Ray's CPUs, and GPUs."""

    threads: int
    cpus: int
    gpus: int


def ray() -> Any:
    """The package. Raises ShardError where it is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ShardError(
            f"--ray needs Ray, which cannot be imported: {error}. Run: pip install"
            ' "kvpress-engine[ray]", or share the run without it: torchrun and --shards.'
        ) from error


@contextmanager
def cluster() -> Iterator[None]:
    """The Ray of this process, that of RAY_ADDRESS, or a local one for as long as this lasts.

    What it prints meanwhile goes to stderr: a command's output is its results. Raises ShardError
    where none answers.
    """
    with _running(), redirect_stdout(sys.stderr):
        yield


@contextmanager
def _running() -> Iterator[None]:
    package = ray()
    if package.is_initialized():
        yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    address = os.environ.get(ADDRESS)
    if (address or "").startswith("ray://"):
        raise ShardError(
            f"{ADDRESS}={address} is a Ray client, which hands over no results one by one. Run the"
            f" command on a node of the cluster, with {ADDRESS}=auto."
        )
    own = {} if address else {"include_dashboard": False, "object_store_memory": _STORE}
    try:
        package.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **own
        )
    except Exception as error:  # of any kind, where a machine is slow or nobody answers
        where = f"{ADDRESS}={address}" if address else "a local Ray"
        raise ShardError(
            f"--ray: {where} cannot be used: {error} Start one with ray start --head, or leave"
            f" {ADDRESS} out for a local one."
        ) from error
    try:
        yield
    finally:
        package.shutdown()


def share(actors: int, device: str | None, threads: int | None) -> Share:
    """What each of some actors gets, all of the same.

    device: that of the model; None takes GPUs where the cluster has some. threads: instead of an
    even share of the cores. Raises ShardError where there is no room for so many.
    """
    nodes = [node["Resources"] for node in ray().nodes() if node["Alive"]]
    on_gpu = any(node.get("GPU") for node in nodes) if device is None else device != "cpu"
    return share_of(nodes, actors, int(on_gpu), threads)


def share_of(
    nodes: Sequence[Mapping[str, float]], actors: int, gpus: int, threads: int | None
) -> Share:
    """The most cores that all of some actors can have, each on one node, beside a GPU where asked.

    nodes: what Ray says that each has.
    """
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    for cpus in range(min(most, threads or most), 0, -1):
        if _places(nodes, cpus, gpus) >= actors:
            return Share(threads or cpus, cpus, gpus)
    what = "a GPU and a core" if gpus else "a core"
    raise ShardError(
        f"--ray {actors}: each actor takes {what}, and Ray has room for"
        f" {_places(nodes, 1, gpus)} of them. Give as many at most, or add nodes: ray start"
        " --address=..."
    )


def _places(nodes: Sequence[Mapping[str, float]], cpus: int, gpus: int) -> int:
    """How many actors have room."""
    room = 0
    for node in nodes:
        held = int(node.get("CPU", 0) // cpus)
        room += min(held, int(node.get("GPU", 0) // gpus)) if gpus else held
    return room
