"""Models that several processes hold together: processes with gloo, and what each of them found."""

from __future__ import annotations

import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import multiprocessing
from transformers import AutoModelForCausalLM

import kvpress

SECONDS = 150  # that a test waits for its processes


class Ended(NamedTuple):
    """How a process ended: what it returned, or what it raised, and with which code."""

    found: Any
    error: str
    code: int | None


class Outcome(NamedTuple):
    """What a policy did to a text."""

    tokens: list[list[int]]
    positions: list[list[list[list[int]]]]  # [sequence][layer][head]
    bytes_held: list[int]  # of every layer
    slots_kept: list[list[list[int]]]


def run(world: int, work: Callable[..., Any], *given: Any) -> list[Ended]:
    """`work(rank, world, *given)` in so many processes, which end within SECONDS."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # what is imported already is there
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    targets = [(rank, world, port, pipes[rank][1], work, given) for rank in range(world)]
    processes = [context.Process(target=_process, args=args) for args in targets]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python 3.12, where other threads are there
        for process in processes:
            process.start()
    end, ended = time.monotonic() + SECONDS, []
    for process, (mine, theirs) in zip(processes, pipes, strict=True):
        theirs.close()
        try:
            ready = mine.poll(max(0.1, end - time.monotonic()))
            found, error = mine.recv() if ready else (None, "it said nothing in time")
        except EOFError:
            found, error = None, "it was gone"
        process.join(max(0.1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        ended.append(Ended(found, error, process.exitcode))
    return ended


def together(world: int, work: Callable[..., Any], *given: Any) -> list[Any]:
    """What every process returned; one that raised fails the test with what it said."""
    ended = run(world, work, *given)
    for rank, process in enumerate(ended):
        assert not process.error, f"process {rank} of {world}: {process.error}"
    return [process.found for process in ended]


def _process(
    rank: int, world: int, port: int, to: Any, work: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        to.send((work(rank, world, *given), ""))
    except BaseException:
        to.send((None, traceback.format_exc()))
        os._exit(1)
    os._exit(0)  # without what the parent would do at its end


def divided(path: Path, world: int, plan: dict[str, str] | None = None) -> Any:
    """The part of a saved model that this process has."""
    config = distributed().DistributedConfig(tp_size=world, tp_plan=plan)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
    return model.eval()


def distributed() -> Any:
    """transformers' own part that divides models; skips where this version has none."""
    module = pytest.importorskip("transformers.distributed")
    if not hasattr(module, "DistributedConfig"):
        pytest.skip("this transformers divides no models by a DistributedConfig")
    return module


def outcome(model: Any, policy: str, ids: torch.Tensor, new: int, **options: Any) -> Outcome:
    """What a policy does to a prompt and `new` greedy tokens."""
    with kvpress.attach(model, policy, **options) as engine:
        out = engine.generate(ids, max_new_tokens=new, do_sample=False)
        cache = engine.cache
        report = cache.report()
        every = [kept(cache, b) for b in range(len(ids))]
        held = [layer.bytes_held for layer in report.layers]
        return Outcome(out.tolist(), every, held, report.slots_kept)


def kept(cache: Any, sequence: int) -> list[list[list[int]]]:
    """The kept positions of one sequence: [layer][head]."""
    return [
        [cache.kept_positions(state.kind.index, sequence, h) for h in range(state.kind.heads)]
        for state in cache.states
    ]


def check(alone: Outcome, parts: list[Outcome], replicated: bool = False) -> None:
    """That processes say and keep together what one says and keeps alone.

    Bytes: pages of the same rows are the same; what belongs to a sequence is there once in every
    process, and a table of pages is as wide as the longest row that is there.
    """
    for part in parts:
        assert part.tokens == alone.tokens
    for b, layers in enumerate(alone.positions):
        for place, heads in enumerate(layers):
            every = [part.positions[b][place] for part in parts]
            assert replicated or [row for rows in every for row in rows] == heads
            assert not replicated or every == [heads] * len(parts)
    for place, held in enumerate(alone.bytes_held):
        sums = sum(part.bytes_held[place] for part in parts)
        whole = held * len(parts) if replicated else held
        assert abs(sums - whole) <= 256 * len(parts), (place, sums, whole)
