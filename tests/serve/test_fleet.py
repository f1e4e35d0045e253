"""Many replicas as one batcher, over scripted ones: nothing is lost, repeated or left behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fleets import NEEDED, Fakes, Link
from scripted import WORDS
from serving import chat, events, eventually, serving

from kvpress.batching.handle import Event, Handle
from kvpress.batching.request import Drawn, Request
from kvpress.errors import DeadlineError, RefusedError, ServingError, TooLargeError
from kvpress.serve.problems import Problem
from kvpress.serve.replicas import dispatch, keeper, member
from kvpress.serve.replicas.scaling import Scaling
from kvpress.serve.replicas.wire import Command, Lost, portable
from kvpress.serve.service import Service

LONG = "a long answer, of which nothing may be said twice. " * 5


def submit(fakes: Fakes, count: int, new: int = 2000, **more: Any) -> list[Handle]:
    return [fakes.fleet.submit([5, number], max_new_tokens=new, **more) for number in range(count)]


def tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)


def test_all_replicas_serve_and_each_request_gets_its_answer(tokenizer: Any) -> None:
    with Fakes(tokenizer, 3) as fakes:
        handles = submit(fakes, 9)
        found = [handle.result(20).tokens for handle in handles]
        assert found == [tokens(tokenizer, WORDS)] * 9
        assert [len(fakes.batcher(number).requests) for number in range(3)] == [3, 3, 3]
        stats = fakes.fleet.stats()
        assert (stats.submitted, stats.finished, stats.failed, stats.running) == (9, 9, 0, 0)
        assert stats.bytes_promised == 0 and stats.bytes_capacity == 30 * NEEDED
        eventually(lambda: fakes.fleet.stats().generated_tokens == sum(map(len, found)))
        assert handles[0].usage.completion_tokens == len(found[0])
        assert handles[0].usage.slots_kept == 50


def test_of_a_lost_replica_what_had_no_token_begins_anew_and_the_rest_ends(
    tokenizer: Any,
) -> None:
    with Fakes(tokenizer, 2, lambda request: LONG, pace=0.003) as fakes:
        handles = submit(fakes, 4)
        lost = fakes.links[0][0]
        begun = [handle for handle in handles if handle.number in lost.replica._handles]
        others = [handle for handle in handles if handle not in begun]
        eventually(lambda: all(len(handle.drawn) > 3 for handle in handles))
        fakes.hold(0)
        fakes.hold(1)
        eventually(lambda: fakes.fleet.stats().running == 4)
        untouched = submit(fakes, 4)
        mine = [handle for handle in untouched if handle.number in lost.replica._handles]
        assert len(begun) == len(mine) == 2
        fakes.kill(0)
        fakes.batcher(1).holds = False
        for handle in begun:
            with pytest.raises(ServingError, match=r"Replica 0.*was lost.*after \d+ tokens"):
                handle.result(20)
            drawn = tuple(one.token for one in handle.drawn)
            assert drawn == tokens(tokenizer, LONG)[: len(drawn)]  # none missing, none twice
        for handle in (*others, *untouched):
            assert handle.result(60).tokens == tokens(tokenizer, LONG)
            assert tuple(one.token for one in handle.drawn) == tokens(tokenizer, LONG)
        fakes.whole(2)
        replicas, stats = fakes.fleet.replicas, fakes.fleet.stats()
        assert (replicas.restarts, replicas.moved) == (1, 2)
        assert (stats.finished, stats.failed, stats.submitted) == (6, 2, 8)
        assert stats.bytes_promised == 0 and stats.generated_tokens > 6 * len(LONG)
        assert len(fakes.links[0]) == 2
        assert submit(fakes, 2)[0].result(20).tokens == tokens(tokenizer, LONG)


def test_news_that_a_lost_replica_sent_before_are_handed_out_first(tokenizer: Any) -> None:
    """What came is delivered, what did not is not: the error comes behind the last token."""
    with Fakes(tokenizer, 1, lambda request: LONG, pace=0.001) as fakes:
        (handle,), heard = submit(fakes, 1), []
        handle.listen(heard.append)
        eventually(lambda: len(handle.drawn) > 20)
        fakes.kill(0)
        with pytest.raises(ServingError):
            handle.result(20)
        said = len(handle.drawn)
        fakes.whole(1)
        assert len(handle.drawn) == said == sum(len(event.drawn) for event in heard)
        assert heard[-1].error is not None and sum(event.ends for event in heard) == 1


def test_a_request_begins_anew_at_most_once(tokenizer: Any) -> None:
    with Fakes(tokenizer, 3) as fakes:
        fakes.hold(0, 1, 2)
        (handle,) = submit(fakes, 1)
        for number in (0, 1):
            eventually(lambda n=number: bool(fakes.batcher(n).requests))  # type: ignore[misc]
            fakes.kill(number)
        with pytest.raises(ServingError, match=r"Replica 1.*after 0 tokens"):
            handle.result(20)
        assert not fakes.batcher(2).requests


def test_a_request_whose_time_is_counted_from_its_first_submission(tokenizer: Any) -> None:
    with Fakes(tokenizer, 2) as fakes:
        fakes.hold(0)
        (handle,) = submit(fakes, 1, timeout=30.0)
        eventually(lambda: bool(fakes.batcher(0).requests))
        fakes.kill(0)
        usage = handle.result(20).usage
        (again,) = fakes.batcher(1).requests
        assert again.timeout is not None and again.timeout < 30.0
        assert usage is handle.usage and handle.usage.seconds is not None


def test_cancelled_and_paused_requests_are_so_on_their_replica(tokenizer: Any) -> None:
    with Fakes(tokenizer, 2, lambda request: LONG, pace=0.001) as fakes:
        first, second = submit(fakes, 2)
        eventually(lambda: len(first.drawn) > 2 and len(second.drawn) > 2)
        first.cancel()
        assert first.result(20).reason == "cancelled"
        assert tuple(one.token for one in first.drawn) == first.result().tokens
        second.pause()
        eventually(lambda: all(one.is_paused for one in fakes.batcher(1).handles.values()))
        said = len(second.drawn)
        second.pause(False)
        eventually(lambda: len(second.drawn) > said + 3)
        second.pause()
        second.cancel()
        assert second.result(20).reason == "cancelled"
        eventually(lambda: not fakes.batcher(0).handles and not fakes.batcher(1).handles)
        assert fakes.fleet.stats().cancelled == 2 and fakes.fleet.stats().bytes_promised == 0


def test_a_cancelled_request_of_a_lost_replica_is_cancelled_and_not_begun_anew(
    tokenizer: Any,
) -> None:
    with Fakes(tokenizer, 2) as fakes:
        fakes.hold(0)
        (handle,) = submit(fakes, 1)
        fakes.kill(0)
        handle.cancel()
        assert handle.result(20).reason == "cancelled"
        assert not fakes.batcher(1).requests


def test_where_one_replica_is_full_another_is_tried_and_then_the_client_is_refused(
    tokenizer: Any,
) -> None:
    with Fakes(tokenizer, 2, most_waiting=2) as fakes:
        fakes.hold(0, 1)
        handles = submit(fakes, 4)
        with pytest.raises(RefusedError, match="2 replicas") as refused:
            # Requests that run are no more counted as waiting once the replica has said so.
            for _ in range(100):
                handles += submit(fakes, 1)
        assert refused.value.retry_after >= 1.0
        assert {len(fakes.batcher(number).requests) for number in (0, 1)} == {2}
        assert fakes.fleet.stats().refused >= 1


def test_what_a_replica_refuses_behind_its_word_goes_to_another(tokenizer: Any) -> None:
    """The front process had not heard yet that it was full."""
    with Fakes(tokenizer, 2) as fakes:
        fakes.batcher(0).most_waiting = 0
        handles = submit(fakes, 4)
        assert [handle.result(20).tokens for handle in handles] == [tokens(tokenizer, WORDS)] * 4
        assert fakes.fleet.stats().finished == 4
        fakes.batcher(1).most_waiting = 0
        with pytest.raises(RefusedError):
            submit(fakes, 1)[0].result(20)


def test_prompts_that_begin_alike_go_to_the_same_replica(tokenizer: Any) -> None:
    with Fakes(tokenizer, 2) as fakes:
        for number in range(8):
            prompt = [number % 2] * 40 + [number]
            fakes.fleet.submit(prompt, max_new_tokens=5).result(20)
            if number == 0:
                fakes.fleet.submit([9], max_new_tokens=5, tenant="b")
        for number in (0, 1):
            first = {one.ids[0] for one in fakes.batcher(number).requests}
            assert len(first - {9}) <= 2
        owner = {one.ids[0] for one in fakes.batcher(0).requests if len(one.ids) > 40}
        other = {one.ids[0] for one in fakes.batcher(1).requests if len(one.ids) > 40}
        assert not owner & other


def test_errors_keep_their_class_and_fail_alone(tokenizer: Any) -> None:
    with Fakes(tokenizer, 1, lambda request: LONG, pace=0.001) as fakes:
        with pytest.raises(TooLargeError):
            fakes.fleet.submit([1] * 4000, max_new_tokens=200)
        (handle,) = submit(fakes, 1)
        eventually(lambda: len(handle.drawn) > 2)
        fakes.batcher(0).fail(ArithmeticError("no number"))
        with pytest.raises(ArithmeticError, match="no number"):
            handle.result(20)
        assert fakes.fleet.stats().failed == 1 and fakes.fleet.replicas.restarts == 0


class Odd(Exception):
    """One that other processes do not know."""


def test_errors_cross_with_class_message_and_time_to_wait() -> None:
    assert portable(RefusedError("full", 7.0)).retry_after == 7.0  # type: ignore[attr-defined]
    for error in (TooLargeError("long"), ValueError("no"), DeadlineError("late")):
        assert portable(error) is error
    assert str(portable(Odd("strange"))) == "Odd: strange"
    unread = UnicodeDecodeError("utf-8", b"x", 0, 1, "why")
    assert portable(unread) is unread


def test_commands_are_done_in_the_order_in_which_they_were_sent(tokenizer: Any) -> None:
    """A long prompt may come behind the message that cancels it."""
    with Fakes(tokenizer, 1) as fakes:
        replica = fakes.links[0][0].replica
        fakes.hold(0)
        request = Request((1, 2), 5)
        at = fakes.links[0][0]._places
        replica.tell(at + 1, [Command(1, cancelled=True)])
        assert not fakes.batcher(0).requests
        replica.tell(at, [Command(1, request), Command(1, request, paused=True)])
        assert len(fakes.batcher(0).requests) == 2
        eventually(lambda: fakes.batcher(0).stats().cancelled >= 1)


def test_a_silent_stuck_or_deaf_replica_is_given_up(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Fakes(tokenizer, 2) as fakes:
        own = fakes.fleet._dispatch.members[0]
        eventually(lambda: own.stats is not None)
        news = fakes.links[0][0].replica.news(0.0)
        own.check(news)
        with pytest.raises(Lost, match="no step"):
            busy = news.stats._replace(running=1)
            own.check(news._replace(stats=busy, rested=member.STUCK + 1))
        with pytest.raises(Lost, match="stopped"):
            own.check(news._replace(stats=news.stats._replace(alive=False)))
        monkeypatch.setattr(member, "UNREAD", -1.0)
        own._sent += 1
        with pytest.raises(Lost, match="read nothing"):
            own.check(news)
        eventually(lambda: len(fakes.links[0]) == 2)
        monkeypatch.undo()
        fakes.whole(2)
        fakes.hold(0)
        (handle,) = submit(fakes, 1)
        fakes.links[0][-1].silent = True
        assert handle.result(20).reason == "stop"  # of the other one
        assert len(fakes.batcher(1).requests) == 1


def test_a_batcher_that_has_stopped_is_replaced(tokenizer: Any) -> None:
    with Fakes(tokenizer, 2) as fakes:
        fakes.hold(0)
        (handle,) = submit(fakes, 1)
        eventually(lambda: bool(fakes.batcher(0).handles))
        fakes.batcher(0).die()
        assert handle.result(20).tokens == tokens(tokenizer, WORDS)
        fakes.whole(2)


def test_a_request_does_not_outlive_its_time_where_a_replica_says_nothing(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_GRACE", 0.1)
    with Fakes(tokenizer, 1) as fakes:
        fakes.hold(0)
        (handle,) = submit(fakes, 1, timeout=0.2)
        with pytest.raises(DeadlineError):
            handle.result(20)
        eventually(lambda: not fakes.batcher(0).handles)  # it was told


def test_why_the_first_replicas_cannot_be_started_is_said_and_all_are_ended(
    tokenizer: Any,
) -> None:
    with pytest.raises(ServingError, match="no such model"):
        Fakes(tokenizer, 2, fails=[ServingError("no such model")])


def test_a_replica_that_cannot_be_started_again_is_tried_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "_LONGEST_PAUSE", 0.05)
    with Fakes(tokenizer, 1) as fakes:
        fakes.fails = [ServingError("not now")] * 2
        fakes.kill(0)
        eventually(lambda: fakes.fleet.replicas.alive == 0)
        with pytest.raises(ServingError, match="No replica serves"):
            submit(fakes, 1)
        assert not fakes.fleet.stats().alive
        service = Service(*[None] * 6)  # type: ignore[arg-type]
        service.batcher = fakes.fleet
        with pytest.raises(Problem, match="being started") as absent:
            service.check_open()
        assert (absent.value.status, absent.value.headers) == (503, {"retry-after": "10"})
        assert not service.healthy
        fakes.whole(1)
        assert submit(fakes, 1)[0].result(20).tokens == tokens(tokenizer, WORDS)
        assert fakes.fleet.replicas.restarts == 3


def test_drain_waits_and_close_ends_everything(tokenizer: Any) -> None:
    with Fakes(tokenizer, 2, lambda request: LONG, pace=0.0002) as fakes:
        handles = submit(fakes, 4, new=200)
        assert fakes.fleet.drain(30.0) and all(handle.done for handle in handles)
        with pytest.raises(ServingError, match="closing"):
            submit(fakes, 1)
    with Fakes(tokenizer, 2) as fakes:
        fakes.hold(0, 1)
        handles = submit(fakes, 2)
        assert not fakes.fleet.drain(0.1)
        fakes.fleet.close()
        for handle in handles:
            with pytest.raises(ServingError, match="closed"):
                handle.result(0)
    assert fakes.overs == 1
    assert all(link.closed and link.dead for (link,) in fakes.links.values())
    assert not [one for one in threading.enumerate() if one.name.startswith("kvpress-replica")]


def test_replicas_are_started_and_let_go_as_the_work_asks(tokenizer: Any) -> None:
    scaling = Scaling(1, 2, up_after=0.1, down_after=0.1)
    with Fakes(tokenizer, 1, scaling=scaling) as fakes:
        fakes.hold(0)
        handles = submit(fakes, 12)  # bytes for ten find room
        assert fakes.fleet.replicas.wanted == 2
        fakes.whole(2)
        fakes.hold(1)
        handles += submit(fakes, 1)
        eventually(lambda: len(fakes.batcher(1).requests) == 1)
        fakes.batcher(0).holds = fakes.batcher(1).holds = False
        assert [one.result(30).reason for one in handles] == ["stop"] * 13
        fakes.whole(1)
        eventually(lambda: any(link.closed for (link,) in fakes.links.values()))
        assert fakes.fleet.replicas.restarts == 0
        assert submit(fakes, 1)[0].result(20).reason == "stop"


def test_the_server_over_replicas(tokenizer: Any) -> None:
    with Fakes(tokenizer, 2, lambda request: LONG, pace=0.001, most_waiting=3) as fakes:
        fleet: Any = fakes.fleet
        with serving(fleet, tokenizer) as server:
            said = server.chat(max_tokens=50).json()
            assert said["choices"][0]["message"]["content"] == LONG[:50]
            health = server.get("/health").json()
            assert health["replicas"] == {"alive": 2, "starting": 0} and health["status"] == "ok"
            page = server.get("/metrics").text
            policy = f'policy="{fleet.policy}"'
            for line in (
                f"kvpress_replicas_alive{{{policy}}} 2.0",
                f"kvpress_replicas_wanted{{{policy}}} 1.0",
                f"kvpress_replica_restarts_total{{{policy}}} 0.0",
                f'kvpress_replica_requests{{{policy},replica="1"}} 0.0',
            ):
                assert line in page
            assert f"kvpress_step_seconds_count{{{policy}}}" in page
            assert server.chat("x" * 5000).status_code == 413
            with server.raw(chat(stream=True)) as stream:
                eventually(lambda: any(h.drawn for h in fakes.batcher(0).handles.values()))
                fakes.fails = [ServingError("not yet")] * 3
                fakes.kill(0)
                got = b""
                while b'"error"' not in got:
                    got += stream.recv(4096)
                assert b"replica_lost" in got and b"Replica 0" in got
            eventually(lambda: server.get("/health").json()["status"] == "degraded")
            assert server.get("/health").status_code == server.get("/ready").status_code == 200
            assert server.chat(max_tokens=5).status_code == 200
            fakes.hold(1)
            statuses = [0]
            threads = [
                threading.Thread(target=lambda: statuses.append(server.chat().status_code))
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            eventually(lambda: len(fakes.batcher(1).handles) == 3)
            fakes.batcher(1).holds = False
            for thread in threads:
                thread.join()
            parts = events(server.chat(stream=True, max_tokens=9).text)
            assert parts[-1] == "[DONE]" and set(statuses) == {0, 200}


def test_an_end_is_handed_out_once(tokenizer: Any) -> None:
    with Fakes(tokenizer, 1) as fakes:
        fakes.hold(0)
        (handle,) = submit(fakes, 1)
        ticket, _ = fakes.fleet._dispatch.tickets[handle.number]
        for _ in range(2):
            fakes.fleet._dispatch._hand_out(ticket, Event(error=ServingError("once")))
        fakes.fleet._dispatch._hand_out(ticket, Event((Drawn(1),)))
        assert fakes.fleet.stats().failed == 1 and not handle.drawn
        assert isinstance(fakes.links[0][0], Link)
