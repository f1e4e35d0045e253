"""What Prometheus reads: counts, bytes and seconds; no text, no token, no name of a tenant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvpress.serve.contract import Batcher

_SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = tuple(float(2**n) for n in range(13))
HISTOGRAMS = {
    "step_seconds": ("Seconds of a step of the model.", _SHORT),
    "step_tokens": ("Tokens that a step reads.", _TOKENS),
    "queue_seconds": ("Seconds that a request waits before its prompt is read.", _LONG),
    "first_token_seconds": ("Seconds from a request to its first token.", _LONG),
    "token_seconds": ("Seconds from one token of a request to the next.", _SHORT),
}
GAUGES = {
    "requests_running": ("running", "Requests whose tokens are being read or drawn."),
    "requests_waiting": ("waiting", "Requests that wait for room."),
    "bytes_held": ("bytes_held", "Bytes of keys and values that are held now."),
    "bytes_capacity": ("bytes_capacity", "The most bytes that they may take."),
    "bytes_prefixes": ("bytes_prefixes", "Bytes of prompts kept for others that begin alike."),
    "bytes_full_equivalent": ("bytes_full", "Bytes that the same requests would hold in full."),
    "bytes_host": ("bytes_host", "Bytes in the memory of the host."),
    "bytes_disk": ("bytes_disk", "Bytes on the disk."),
}
COUNTERS = {
    "requests_preempted": ("preempted", "Requests whose rows were put aside for others."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "cached_tokens": ("cached_tokens", "Tokens of prompts that were not read anew."),
    "generated_tokens": ("generated_tokens", "Tokens of answers."),
}
OUTCOMES = ("finished", "cancelled", "failed", "refused")


REPLICAS = {
    "replicas_alive": ("alive", "Replicas that serve."),
    "replicas_starting": ("starting", "Replicas that are being started, or started again."),
    "replicas_wanted": ("wanted", "Replicas that the work of this moment asks for."),
}
REPLICA_COUNTERS = {
    "replica_restarts": ("restarts", "Replicas that were lost and started again."),
    "requests_moved": ("moved", "Requests that began anew on another replica."),
}
EACH = {
    "replica_bytes_held": ("bytes_held", "Bytes of keys and values that a replica holds."),
    "replica_bytes_promised": ("bytes_promised", "Bytes that its requests may come to hold."),
    "replica_requests": ("requests", "Requests that it serves, or that wait there."),
}


class Metrics:
    """The figures of one server. Those of the batcher are asked for when somebody reads them."""

    def __init__(self, batcher: Batcher) -> None:
        self._registry = CollectorRegistry()
        self._policy = batcher.policy
        self._invalid = [0]
        self._histograms = {
            name: Histogram(
                f"kvpress_{name}", text, ["policy"], registry=self._registry, buckets=buckets
            ).labels(self._policy)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._step_errors = self._counter("step_errors", "Steps of the model that raised an error.")
        self._left = self._counter("client_disconnects", "Clients that left before their answer.")
        self._registry.register(_Numbers(batcher, self._invalid))
        if hasattr(batcher, "replicas"):
            self._registry.register(_OfReplicas(batcher))
        batcher.observe(self._observe)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"kvpress_{name}", text, ["policy"], registry=self._registry).labels(
            self._policy
        )

    def _observe(self, name: str, value: float) -> None:
        """In the thread of the model."""
        if name in self._histograms:
            self._histograms[name].observe(value)
        elif name == "step_errors":
            self._step_errors.inc(value)

    def left(self) -> None:
        """Counts a client that has left."""
        self._left.inc()

    def invalid(self) -> None:
        """Counts a request that the batcher never saw, because it was not in order."""
        self._invalid[0] += 1

    def page(self) -> bytes:
        """All of them as text."""
        return generate_latest(self._registry)


class _Numbers(Collector):
    """The numbers of a batcher."""

    def __init__(self, batcher: Batcher, invalid: list[int]) -> None:
        self._batcher, self._invalid = batcher, invalid

    def collect(self) -> Iterator[Metric]:
        labels, policy = ["policy"], self._batcher.policy
        try:
            stats = self._batcher.stats()
        except Exception:  # of a dead one nothing is known
            return
        for name, (field, text) in GAUGES.items():
            value = getattr(stats, field)
            if value is not None:
                gauge = GaugeMetricFamily(f"kvpress_{name}", text, labels=labels)
                gauge.add_metric([policy], value)
                yield gauge
        for name, (field, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"kvpress_{name}", text, labels=labels)
            counter.add_metric([policy], getattr(stats, field))
            yield counter
        ended = CounterMetricFamily(
            "kvpress_requests", "Requests by how they ended.", labels=["policy", "outcome"]
        )
        for outcome in OUTCOMES:
            ended.add_metric([policy, outcome], getattr(stats, outcome))
        ended.add_metric([policy, "invalid"], self._invalid[0])
        yield ended


class _OfReplicas(Collector):
    """The numbers of a batcher that has replicas."""

    def __init__(self, batcher: Any) -> None:
        self._batcher = batcher

    def collect(self) -> Iterator[Metric]:
        labels, policy = ["policy"], self._batcher.policy
        replicas = self._batcher.replicas
        for name, (field, text) in REPLICAS.items():
            gauge = GaugeMetricFamily(f"kvpress_{name}", text, labels=labels)
            gauge.add_metric([policy], getattr(replicas, field))
            yield gauge
        for name, (field, text) in REPLICA_COUNTERS.items():
            counter = CounterMetricFamily(f"kvpress_{name}", text, labels=labels)
            counter.add_metric([policy], getattr(replicas, field))
            yield counter
        for name, (field, text) in EACH.items():
            gauge = GaugeMetricFamily(f"kvpress_{name}", text, labels=["policy", "replica"])
            for one in replicas.each:
                gauge.add_metric([policy, str(one.number)], getattr(one, field))
            yield gauge
