"""The processes that a command's options ask for: this one, actors of Ray, those of torchrun."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from kvpress.bench.common.models import Source
from kvpress.bench.common.ranks import silence_others
from kvpress.bench.shards.actors import Actors
from kvpress.bench.shards.cluster import cluster, share
from kvpress.bench.shards.options import ShardOptions
from kvpress.bench.shards.ranks import Shards, use_own_gpu
from kvpress.bench.shards.work import Alone, Team, Worker
from rich.console import Console

errors = Console(stderr=True)


@contextmanager
def team(
    asked: ShardOptions,
    source: Source,
    threads: int | None,
    load: Callable[[], Worker],
    apart: Callable[[], Worker],
) -> Iterator[Team]:
    """They are there, with their models, until this ends.

    load: makes the worker of this process. apart: the same of another one, to which it is sent.
    threads: of each. Raises ShardError, or what loading raises.
    """
    with ExitStack() as ends:
        if asked.ray is not None:
            made: Team = ends.enter_context(actors_of(asked.ray, source, threads, apart))
        elif asked.shards is not None:
            shards = Shards(load, asked.shards)
            silence_others()
            if not source.on_cpu:
                use_own_gpu()
            made = ends.enter_context(shards)
        else:
            with errors.status(f"Loading {source.name} …"):
                made = Alone(load())
        yield made


@contextmanager
def actors_of(
    count: int, source: Source, threads: int | None, apart: Callable[[], Worker]
) -> Iterator[Actors]:
    """So many actors, with their models, until this ends: in the cluster that there is."""
    with ExitStack() as ends:
        with errors.status(f"Loading {source.name} in actors of Ray …"):
            ends.enter_context(cluster())
            place = share(count, source.device, threads)
            actors = ends.enter_context(Actors(apart, count, place))
        yield actors
