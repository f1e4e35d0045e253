"""Decode steps under caps beside everything resident, in turn; and what computing anew takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from kvpress.bench.common.candidates import FULL, Candidate, candidate
from kvpress.bench.common.caps import cache_bytes
from kvpress.bench.common.journal import Row
from kvpress.bench.common.prompt import prompts
from kvpress.bench.common.reads import moves_of, reads_of
from kvpress.bench.common.timing import Samples
from kvpress.bench.speed.rounds import Measurement, run_rounds
from kvpress.bench.tiers.setting import Setting, synchronizer

from kvpress.policy.loading import parse

CAPPED, RESIDENT, UNTIERED = "under the caps", "tiers, all on the device", "without tiers"
OFFLOADED = "transformers-offloaded"
_ROOM = 3.0  # of the bytes of a cache, so that it stays on the device; the rest is not touched


class Case(NamedTuple):
    """A policy under some caps, and the cases whose tokens and logits it must have."""

    policy: str
    caps: dict[str, Any] | None
    same_tokens: str
    same_logits: str


def cases(
    policies: Sequence[str], caps: dict[str, Any], resident: dict[str, Any]
) -> dict[str, Case]:
    """What is timed: without tiers, all on the device, and under the caps.

    Policies that read some pages only stand under the same caps as exact streaming.
    """
    exact = exact_part(policies[0])
    made = {
        UNTIERED: Case(exact, None, UNTIERED, RESIDENT),
        RESIDENT: Case(exact, resident, UNTIERED, RESIDENT),
        CAPPED: Case(exact, caps, UNTIERED, RESIDENT),
    }
    for policy in policies:
        if policy != exact:
            ours, capped = (named(policy, name) for name in (RESIDENT, CAPPED))
            made[ours] = Case(policy, resident, ours, ours)
            made[capped] = Case(policy, caps, ours, ours)
    return made


def measure(setting: Setting, model: Any, tokenizer: Any) -> dict[str, Row]:
    """A row per candidate; that of transformers' offloaded cache only on a GPU."""
    steps = setting.steps + setting.warmup
    ids_BQ = prompts(model, tokenizer, setting.tokens, setting.batch, steps)
    whole = cache_bytes(model, setting.tokens + steps, setting.batch)
    resident = {"device": int(_ROOM * whole), "host": None, "disk": None}
    known = cases(setting.policies, setting.sizes(whole), resident)
    starts: dict[str, Any] = {
        name: partial(_start, setting, model, ids_BQ, case) for name, case in known.items()
    }
    if ids_BQ.is_cuda:
        made = partial(candidate, model, OFFLOADED)
        starts[OFFLOADED] = lambda: _Steps(made(), ids_BQ)
    wait = synchronizer(ids_BQ.device)
    rows = run_rounds(starts, setting.steps, setting.warmup, None, wait)
    for name, row in rows.items():
        if row["error"] is None:
            case = known.get(name, known[UNTIERED])
            row["same_tokens"] = row["token_ids"] == rows[case.same_tokens].get("token_ids")
            row["same_logits"] = row["logits"] == rows[case.same_logits].get("logits")
    for row in rows.values():
        for part in ("token_ids", "logits"):
            row.pop(part, None)
    return rows


def exact_part(policy: str) -> str:
    """The same policy with steps that read everything."""
    recipe = parse(policy)
    if not recipe.retrieves:
        return policy
    others = [str(own) for own in recipe.policies if not own.overrides("retrieve")]
    return "+".join(others) or FULL


def named(policy: str, case: str) -> str:
    """The name of a policy that reads some pages only, in one of the cases."""
    return f"{policy}, {case.removeprefix('tiers, ')}"


def _start(setting: Setting, model: Any, ids_BQ: torch.Tensor, case: Case) -> Measurement:
    steps = setting.steps + setting.warmup
    return _Steps(candidate(model, case.policy, None, steps, case.caps), ids_BQ)


class _Steps:
    """A cache that has read different prompts, and decodes a token of each per round."""

    def __init__(self, candidate: Candidate, ids_BQ: torch.Tensor) -> None:
        self._candidate, self._cache = candidate, candidate.new_cache()
        wait = synchronizer(ids_BQ.device) or (lambda: None)
        begun = perf_counter()
        logits_B1Y = candidate.forward(ids_BQ, self._cache)
        wait()
        self._prompt = perf_counter() - begun
        self._token_B1 = logits_B1Y[:, -1].argmax(-1, keepdim=True)
        self._seen: list[list[int]] = []
        self._logits_B1Y = logits_B1Y
        self._before = self._flows()

    def round(self, number: int) -> torch.Tensor:
        self._logits_B1Y = self._candidate.forward(self._token_B1, self._cache)
        self._token_B1 = self._logits_B1Y[:, -1].argmax(-1, keepdim=True)
        return self._token_B1

    def settle(self, timed: bool) -> None:
        self._seen.append(self._token_B1.flatten().tolist())
        if not timed:
            self._before = self._flows()

    def _flows(self) -> dict[str, float]:
        """What tiers have done so far."""
        if self._candidate.tiers is None:
            return {}
        tiers = self._cache.report().tiers
        ways = {name: way.bytes for name, way in tiers.ways.items()}
        hits = {f"hits {name}": count for name, count in tiers.hits.items()}
        seconds = {"stalls": tiers.stalls, "reads": tiers.ways["disk to host"].seconds}
        return {**ways, **hits, **seconds, **moves_of(self._cache)._asdict()}

    def row(self, taken: Samples) -> Row:
        after = self._flows()
        made: Row = {
            "prompt_seconds": self._prompt,
            "bytes_held": self._candidate.bytes_held(self._cache),
            "reads": reads_of(self._cache),
            "token_ids": self._seen,
            "logits": self._logits_B1Y.float().flatten().tolist(),
            "per_step": {k: (after[k] - self._before[k]) / taken.count for k in after},
        }
        if self._candidate.tiers is not None:
            made["tiers"] = asdict(self._cache.report().tiers)
            self._candidate.tiers.close()
        return made
