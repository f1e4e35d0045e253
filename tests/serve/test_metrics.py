"""What Prometheus reads of a server."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from scripted import Batcher
from serving import serving

NAMES = {
    *("requests", "requests_running", "requests_waiting", "requests_preempted", "prompt_tokens"),
    *("cached_tokens", "generated_tokens", "bytes_held", "bytes_prefixes", "bytes_full_equivalent"),
    *("bytes_host", "bytes_disk", "step_seconds", "step_tokens", "queue_seconds", "token_seconds"),
    *("first_token_seconds", "step_errors", "client_disconnects"),
}


def test_all_figures_are_there_with_the_policy_and_no_text(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer)
    with serving(batcher, tokenizer, keys=("k" * 32,)) as server:
        key = {"authorization": f"Bearer {'k' * 32}"}
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "abc"}, **key).is_success
        server.post("/v1/completions", {"model": "tiny", "prompt": 5}, **key)
        server.chat()
        for name, value in (("step_errors", 2.0), ("queue_seconds", 0.3), ("unknown", 1.0)):
            batcher._listeners[0](name, value)
        page = server.get("/metrics")
    families = {one.name: one for one in text_string_to_metric_families(page.text)}
    assert {f"kvpress_{name}" for name in NAMES} <= families.keys()
    samples = [one for family in families.values() for one in family.samples]
    assert {one.labels["policy"] for one in samples} == {batcher.policy}
    assert {name for one in samples for name in one.labels} <= {"policy", "outcome", "le"}
    values = {(one.name, one.labels.get("outcome")): one.value for one in samples}
    assert values["kvpress_requests_total", "finished"] == 1
    assert values["kvpress_requests_total", "invalid"] == 2
    assert values["kvpress_prompt_tokens_total", None] == 3
    assert values["kvpress_generated_tokens_total", None] == batcher.stats().generated_tokens
    assert values["kvpress_step_errors_total", None] == 2
    assert values["kvpress_queue_seconds_count", None] == 1
    assert values["kvpress_step_seconds_count", None] > 0
    assert ("kvpress_bytes_capacity", None) not in values  # there is no cap
    assert page.headers["content-type"].startswith("text/plain")


def test_of_a_batcher_that_cannot_be_asked_the_rest_is_told(tokenizer: Any) -> None:
    batcher = Batcher(tokenizer)
    with serving(batcher, tokenizer) as server:

        def broken() -> Any:
            raise ArithmeticError("gone")

        stats, batcher.stats = batcher.stats, broken  # type: ignore[method-assign]
        page = server.get("/metrics")
        health = server.get("/health")
        batcher.stats = stats  # type: ignore[method-assign]
    assert page.status_code == 200 and "kvpress_step_seconds" in page.text
    assert "kvpress_bytes_held" not in page.text and health.status_code == 503
