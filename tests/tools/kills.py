"""Saves of a session that are killed, 200 times: what is there then is the old or the new one.

The first ones are killed before a call of the operating system, each of them once; the others at
any time. Prints how often it was killed, and what was found: the old session, the new one.
"""

from __future__ import annotations

import fcntl
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sessions
import torch

KILLS = 200
CALLS = {
    os: ("open", "close", "replace", "unlink", "fsync", "fdatasync", "pwritev", "copy_file_range"),
    fcntl: ("flock", "ioctl"),
}


def shim(before: Callable[[], None]) -> None:
    """Calls something before every call of the operating system that writes, locks or names."""
    for module, names in CALLS.items():
        for name in names:
            real = getattr(module, name)

            def call(*given: Any, real: Any = real, **named: Any) -> Any:
                before()
                return real(*given, **named)

            setattr(module, name, call)


def child(do: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        do()
    finally:
        os._exit(0)


def count(save: Callable[[], None]) -> int:
    """How many calls a save makes: counted in a process of its own."""
    read, write = os.pipe()

    def counted() -> None:
        calls = [0]

        def one() -> None:
            calls[0] += 1

        shim(one)
        save()
        os.write(write, str(calls[0]).encode())

    os.waitpid(child(counted), 0)
    return int(os.read(read, 100))


def kill_before(number: int, save: Callable[[], None]) -> None:
    """A save that is killed before this call."""

    def killed() -> None:
        left = [number]

        def one() -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        shim(one)
        save()

    os.waitpid(child(killed), 0)


def kill_after(seconds: float, save: Callable[[], None]) -> None:
    pid = child(save)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main(folder: Path) -> None:
    chat, draw, found = folder / "chat", random.Random(0), {True: 0, False: 0}
    engine = sessions.attached("full", sessions.caps("host and disk", folder / "tier"))
    caches = [sessions.filled(engine, 300)]
    caches.append(caches[0].fork())
    sessions.goes_on(engine, caches[1], sessions.STEPS[:3])
    lengths = [cache.get_seq_length() for cache in caches]
    expected = [sessions.goes_on(engine, cache.fork(), sessions.STEPS[:1]) for cache in caches]
    caches[0].save(chat)
    begun = time.perf_counter()
    calls = count(lambda: caches[1].save(chat))
    whole, there = time.perf_counter() - begun, 1
    gc.collect()
    gc.freeze()  # what is collected below are the caches that were loaded
    for number in range(KILLS):
        save = partial(caches[1 - there].save, chat)
        if number < calls:
            kill_before(number, save)
        else:
            kill_after(draw.uniform(0, 0.7 * whole), save)
        loaded = engine.load_cache(chat)  # every byte is checked
        now = lengths.index(loaded.get_seq_length())
        if number % 10 == 0:
            given = sessions.goes_on(engine, loaded, sessions.STEPS[:1])
            assert sessions.same(given, expected[now])
        found[now == there] += 1
        there = now
        del loaded
        gc.collect()
    caches[0].save(chat)
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    assert names == sorted(["chat", sessions.data_file(chat).name]), names
    print(calls, KILLS, found[True], found[False], flush=True)
    os._exit(0)  # what was frozen would be reported as lost


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
