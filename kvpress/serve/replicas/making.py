"""Replicas as the command line asks for them."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import replace
from typing import Any, NamedTuple

from kvpress.errors import ServingError
from kvpress.serve.replicas.cluster import Cluster, cpus_each, ray_of
from kvpress.serve.replicas.fleet import Fleet
from kvpress.serve.replicas.plan import Plan
from kvpress.serve.replicas.scaling import Scaling


class Counts(NamedTuple):
    """How many replicas there are at least and at most."""

    least: int
    most: int


def counts(text: str) -> Counts:
    """Of `4` or `1-4`. Raises ServingError, also where Ray is missing."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text.strip())
    least = int(found.group(1)) if found else 0
    most = int(found.group(2) or least) if found else 0
    if not 1 <= least <= most:
        raise ServingError(
            f"--replicas {text} cannot be read. Allowed: a number of at least 1, or two of them"
            " for as many as the work asks for: 4, 1-4."
        )
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ServingError(
            "--replicas under torchrun: a replica holds the whole model in one process, batching"
            " does not divide one among several yet. Start kvpress serve without torchrun."
        )
    ray_of()
    return Counts(least, most)


def made_fleet(plan: Plan, many: Counts, log: bool = True) -> tuple[Fleet, Any]:
    """Replicas that serve, and the tokenizer of their model. log: show what replicas log.

    On GPUs each has one of its own; on CPUs they divide the cores. Raises ServingError where there
    are too few, and what loading a model raises.
    """
    cluster = Cluster(log)
    try:
        gpus = _gpus(plan.source.device)
        if gpus and cluster.has("GPU") < many.most:
            raise ServingError(
                f"--replicas {many.most}: each needs a GPU, and Ray knows of"
                f" {cluster.has('GPU'):g}. Ask for fewer, or give --device cpu."
            )
        cpus = cpus_each(cluster.has("CPU"), many.most, plan.threads)
        source = replace(plan.source, device="cuda" if gpus else "cpu")
        threads = plan.threads or (None if gpus else max(int(cpus), 1))
        made = replace(plan, source=source, threads=threads)
        links = cluster.links(made, secrets.token_hex(4), min(cpus, 1.0) if gpus else cpus, gpus)
        fleet = Fleet(links, Scaling(many.least, many.most), cluster.close)
    except BaseException:
        cluster.close()
        raise
    return fleet, fleet.tokenizer


def _gpus(device: str | None) -> int:
    """How many each replica has. Raises ServingError for one by its number."""
    import torch

    if device is None:
        return int(torch.cuda.is_available())
    kind, _, number = device.partition(":")
    if number:
        raise ServingError(
            f"--device {device}: Ray gives each replica a device of its own. Give {kind}."
        )
    if kind not in ("cpu", "cuda"):
        raise ServingError(f"--device {device}: replicas run on cpu or cuda.")
    return int(kind == "cuda")
