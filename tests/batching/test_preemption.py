"""Requests that make room for others, and come back exactly as they were."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import helpers
import pytest
import schedules
from schedules import CHUNK, Planned

import kvpress
from kvpress.batching.request import Request
from kvpress.batching.stepper import Stepper
from kvpress.errors import CacheFileError
from kvpress.hf.cache import EngineCache
from kvpress.store.tiers.caps import Caps

RECIPES = {
    **{n: r for n, r in helpers.recipes().items() if n not in ("leoam", "freekv", "quest")},
    "packed": "snapkv:budget=0.5,window=8+quant:residual=16",
}


def asked(seed: int = 0) -> list[Planned]:
    """Requests of rising priority: each of them finds the room taken by those before it."""
    draw = random.Random(seed)
    planned = []
    for number in range(6):
        ids = draw.choices(range(3, helpers.VOCAB), k=draw.randrange(60, 140))
        request = Request(tuple(ids), draw.randrange(8, 20), priority=number // 2)
        planned.append(Planned(request, 3 * number))
    return planned


def caps(engine: Any, requests: list[Planned], **places: Any) -> Caps:
    """Room for the largest request, and a little more."""
    own = schedules.made(engine)
    needed = [own.desk.handle(0, one.request, lambda: None).needed for one in requests]
    idle = schedules.made(engine, caps=10**9).stepper.reserving.promised
    return Caps(idle + int(1.3 * max(needed)), **places)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("name", RECIPES)
def test_who_is_put_aside_draws_the_same_tokens(name: str, place: str, tmp_path: Path) -> None:
    model = schedules.model()
    with kvpress.attach(model, RECIPES[name], tokenizer=helpers.characters()) as engine:
        planned = asked()
        expected = [schedules.alone(engine, one.request)[0] for one in planned]
        disk = Caps.parse("1MiB", None, f"1GiB:{tmp_path}")
        assert disk is not None
        places = {"host": 10**9} if place == "host" else {"disk": disk.disk}
        own = schedules.made(engine, caps=caps(engine, planned, **places))
        most: list[int] = []

        def check(stepper: Stepper) -> None:
            cap = stepper.reserving.cap
            assert cap is not None and stepper.nbytes <= stepper.reserving.promised <= cap
            aside = stepper.parking.bytes_host if place == "host" else stepper.parking.bytes_disk
            most.append(aside)
            assert (aside > 0) == bool(stepper.admission.aside)

        schedules.run(own, planned, check, 2000)
        own.stepper.parking.close()
    handles = [one.handle for one in planned if one.handle]
    assert [list(handle.result(0).tokens) for handle in handles] == expected
    assert own.stepper.counts.preempted == sum(x.usage.preempted for x in handles) > 0
    assert max(most) > 0 and most[-1] == 0
    assert not list(tmp_path.iterdir())


def test_nobody_is_put_aside_where_there_is_no_place() -> None:
    with kvpress.attach(schedules.model(), "full") as engine:
        planned = asked()
        own = schedules.made(engine, caps=caps(engine, planned))
        schedules.run(own, planned, steps=2000)
    assert own.stepper.counts.preempted == 0
    assert all(one.handle and one.handle.done for one in planned)


def test_files_are_private_and_damage_is_told(tmp_path: Path) -> None:
    with kvpress.attach(schedules.model(), "full") as engine:
        planned = asked()
        disk = Caps.parse("1MiB", None, f"1GiB:{tmp_path}")
        assert disk is not None
        own = schedules.made(engine, caps=caps(engine, planned, disk=disk.disk))

        def harm(stepper: Stepper) -> None:
            for file in tmp_path.rglob("*"):
                if file.is_file() and not harmed:
                    assert file.stat().st_mode & 0o077 == file.parent.stat().st_mode & 0o077 == 0
                    whole = bytearray(file.read_bytes())
                    whole[-9] ^= 1
                    file.write_bytes(whole)
                    harmed.append(stepper.admission.aside[0].handle.number)

        harmed: list[int] = []
        schedules.run(own, planned, harm, 2000)
    assert harmed
    for number, one in enumerate(planned):
        assert one.handle is not None
        if number == harmed[0]:
            with pytest.raises(CacheFileError, match="checksum"):
                one.handle.result(0)
        else:
            assert one.handle.result(0).reason == "length"


def test_a_disk_that_is_full_makes_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise CacheFileError("No space left on device.")

    monkeypatch.setattr(EngineCache, "save", full)
    with kvpress.attach(schedules.model(), "full") as engine:
        planned = asked()
        disk = Caps.parse("1MiB", None, f"1GiB:{tmp_path}")
        assert disk is not None
        own = schedules.made(engine, caps=caps(engine, planned, disk=disk.disk))
        schedules.run(own, planned, steps=2000)
    assert own.stepper.counts.preempted == 0
    assert {one.handle.result(0).reason for one in planned if one.handle} == {"length"}


def test_who_leaves_while_aside_frees_its_place() -> None:
    with kvpress.attach(schedules.model(), "full") as engine:
        planned = asked()
        own = schedules.made(engine, caps=caps(engine, planned, host=10**9))

        def leave(stepper: Stepper) -> None:
            for text in stepper.admission.aside:
                text.handle.cancel()

        schedules.run(own, planned, leave, 2000)
    assert own.stepper.parking.bytes_host == 0 and own.stepper.nbytes == 0
    reasons = {one.handle.result(0).reason for one in planned if one.handle}
    assert reasons == {"cancelled", "length"}


def test_a_chunk_is_smaller_than_the_prompts() -> None:
    assert all(len(one.request.ids) > CHUNK for one in asked())
