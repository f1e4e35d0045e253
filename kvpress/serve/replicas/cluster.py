"""Replicas as actors of Ray. This file alone knows Ray, and nothing of it is imported before."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvpress.errors import ServingError
from kvpress.serve.replicas.plan import Plan
from kvpress.serve.replicas.replica import Replica
from kvpress.serve.replicas.wire import Command, Facts, Lost, News

_LOG = logging.getLogger("kvpress.serve")
_SOON = 120.0  # seconds after which it is said that Ray may have no place for a replica
_WAIT = 1.0  # seconds that a replica waits for news before it says that there are none
_STORE = 100 << 20  # bytes of Ray's object store: messages are small, and go past it
_ATTEMPTS = 3  # to start it: its own processes have 30 s for that, too few on a busy machine
_GOODBYE = 10.0  # seconds in which a replica ends in order


def ray_of() -> Any:
    """The package. Raises ServingError where it is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ServingError("--replicas needs ray: pip install 'kvpress-engine[serve,ray]'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to others
    # What a later version of Ray does anyway: an actor without GPUs sees those that are there.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    return importlib.import_module("ray")


class Cluster:
    """Where actors run: the cluster of RAY_ADDRESS, or one of this machine that ends with us.

    Raises ServingError where it cannot be reached or started.
    """

    def __init__(self, log: bool = True) -> None:
        self._ray = ray_of()
        self._own = not self._ray.is_initialized()
        if not self._own:
            return
        given: dict[str, Any] = {"log_to_driver": log, "logging_level": "WARNING"}
        address, attempts = os.environ.get("RAY_ADDRESS"), 1
        if not address:
            given |= {"include_dashboard": False, "object_store_memory": _STORE, "address": "local"}
            attempts = _ATTEMPTS
        for attempt in range(attempts):
            try:
                self._ray.init(**given)
                return
            except Exception as error:
                self._ray.shutdown()
                if attempt == attempts - 1:
                    raise ServingError(_unreachable(address, error)) from error

    def has(self, name: str) -> float:
        """How much of a resource all nodes have: `CPU`, `GPU`."""
        return float(self._ray.cluster_resources().get(name, 0.0))

    def links(self, plan: Plan, run: str, cpus: float, gpus: int) -> Callable[[int], RayLink]:
        """What makes the way to a new replica. cpus, gpus: that Ray sets apart for each."""
        actor = self._ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,  # whoever starts it again must know, and say so to those who wait
            max_task_retries=0,  # a command that is done twice would draw tokens twice
            concurrency_groups={"tell": 1, "news": 1},
        )(Replica)

        def make(number: int) -> RayLink:
            return RayLink(self._ray, actor, plan.of(number, run))

        return make

    def close(self) -> None:
        """Leaves it."""
        if self._own:
            self._ray.shutdown()


class RayLink:
    """The way to one actor."""

    def __init__(self, ray: Any, actor: Any, plan: Plan) -> None:
        self._ray, self._places = ray, itertools.count()
        self._actor = actor.remote(plan)
        self._tell = self._actor.tell.options(concurrency_group="tell")
        self._news = self._actor.news.options(concurrency_group="news")

    def start(self, given_up: Callable[[], bool]) -> Facts:
        """Waits until its model is loaded. Raises what loading raises, Lost."""
        asked, began, said = self._actor.start.remote(), time.monotonic(), False
        while not self._ray.wait([asked], timeout=0.2)[0]:
            if given_up():
                raise Lost("it was given up before its model was loaded")
            if not said and time.monotonic() - began > _SOON:
                said = True
                _LOG.warning("a replica does not serve after %g s: see ray status", _SOON)
        facts: Facts = self._answer(asked)
        return facts

    def tell(self, commands: Sequence[Command]) -> None:
        """Sends commands. What a lost replica is told is forgotten: `hear` says that it is lost."""
        with contextlib.suppress(Exception):  # whatever it is, a caller cannot help it
            self._tell.remote(next(self._places), commands)

    def hear(self, timeout: float) -> News:
        """Waits for what is new. Raises Lost."""
        news: News = self._answer(self._news.remote(_WAIT), timeout)
        return news

    def close(self) -> None:
        """Lets it end what it holds."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._actor.close.remote(), timeout=_GOODBYE)
        self.kill()

    def kill(self) -> None:
        """Ends it at once."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)

    def _answer(self, asked: Any, timeout: float | None = None) -> Any:
        """What an actor answers. Raises what it raises, Lost where it cannot answer."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(asked, timeout=timeout)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except errors.GetTimeoutError:
            raise Lost(f"it said nothing for {timeout:g} seconds") from None
        except errors.RayError as error:
            said = str(error).strip().splitlines() or [""]
            raise Lost(f"its process has ended: {type(error).__name__}, {said[0]}") from None


def _unreachable(address: str | None, error: Exception) -> str:
    """What to do where Ray does not answer."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    if address is None:
        return f"Ray could not be started: {said[0]} Free some memory or cores, and try again."
    return (
        f"RAY_ADDRESS={address}: Ray could not be reached: {said[0]} Start it with ray start"
        " --head, give all nodes the same token (RAY_AUTH_MODE=token), or unset RAY_ADDRESS so that"
        " it is started here."
    )


def cpus_each(all_cpus: float, replicas: int, threads: int | None) -> float:
    """CPUs that Ray sets apart for each of so many replicas, so that all of them find a place."""
    share = max(all_cpus, 1.0) / replicas
    asked = share if threads is None else min(float(threads), share)
    return float(math.floor(asked)) if asked >= 1 else math.floor(asked * 100) / 100
