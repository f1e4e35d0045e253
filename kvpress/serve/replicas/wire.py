"""What the front process and its replicas tell one another; nothing here knows of Ray."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from kvpress.batching.desk import Desk
from kvpress.batching.handle import Event
from kvpress.batching.request import Request, Usage
from kvpress.batching.stats import Stats
from kvpress.errors import ServingError

_KNOWN = {"builtins", "kvpress", "torch"}  # packages whose errors every process can read


class Lost(ServingError):
    """A replica of which nothing can be expected any more, or a request that ended with it."""


class Facts(NamedTuple):
    """What a replica says of itself once its model is loaded.

    desk: checks requests as the replica does. ends: ids that end a text. vocabulary: how many
    tokens there are. shared_chunk: of the parts that prompts share; 0: none. capacity: bytes of
    its keys and values; None: no cap. node: the name of its machine.
    """

    policy: str
    desk: Desk
    ends: tuple[int, ...]
    vocabulary: int
    most_waiting: int
    shared_chunk: int
    capacity: int | None
    tokenizer: Any
    node: str = ""


class Command(NamedTuple):
    """To a replica. request: one that is new; otherwise what has changed of an older one."""

    number: int
    request: Request | None = None
    cancelled: bool = False
    paused: bool = False


class Told(NamedTuple):
    """News of one request. usage: at its end."""

    number: int
    event: Event
    usage: Usage | None = None


class News(NamedTuple):
    """All that is new. figures: as they were measured. rested: seconds since the last step.

    taken: how many messages of the front process were read so far.
    """

    told: tuple[Told, ...]
    figures: tuple[tuple[str, float], ...]
    stats: Stats
    rested: float
    taken: int


class Link(Protocol):
    """The way to one replica."""

    def start(self, given_up: Callable[[], bool]) -> Facts:
        """Waits until its model is loaded. Raises what went wrong, Lost where it is given up."""

    def tell(self, commands: Sequence[Command]) -> None:
        """Sends commands; it never waits, and what a lost replica is told is forgotten."""

    def hear(self, timeout: float) -> News:
        """Waits for what is new, a second at most where all is well. Raises Lost.

        timeout: seconds after which silence means that it is lost.
        """

    def close(self) -> None:
        """Lets it end what it holds, its files too."""

    def kill(self) -> None:
        """Ends it at once."""


def portable(error: BaseException) -> BaseException:
    """The same error where another process can read it, otherwise one that quotes it."""
    if type(error).__module__.partition(".")[0] in _KNOWN:
        try:
            again = pickle.loads(pickle.dumps(error))
            if type(again) is type(error) and str(again) == str(error):
                return error
        except Exception:  # as its class likes
            pass
    return ServingError(f"{type(error).__name__}: {error}")
