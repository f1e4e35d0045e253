"""What `kvpress bench plan` records and shows: planned bytes beside those of a process."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from kvpress.bench.common.environment import environment
from kvpress.bench.common.journal import Journal, Row
from kvpress.bench.common.models import Source
from kvpress.bench.common.report import Sheet
from kvpress.bench.plan import peaks

from kvpress.formulas.sizes import readable

HEAD = ("memory", "tokens", "batch", "policy", "chunk", "keys, values", "planned", "peak", "kept")
LEGEND = (
    "chunk: tokens of each prompt that were read at once. keys, values: what the ledger says, and"
    " in brackets what was planned. planned: the most that it was to take. peak: resident bytes of"
    " a process of its own, at the most, from its start. kept: whether that is within the memory,"
    " and the host tier, which is a part of the process too. refused: nothing fits, and the error"
    " names the least memory that would do."
)


def row(journal: Journal, source: Source, asked: Mapping[str, Any], threads: int) -> Row:
    """The row of these settings, measured where it is not there yet."""
    settings = {"model": source.name, "asked": dict(asked)}
    known = journal.find(settings)
    if known is not None:
        return known
    found = peaks.measure(source, dict(asked), threads)
    place = environment(torch.device("cpu"))
    made = {"bench": "plan", **settings, "environment": place, **found}
    journal.add(made)
    return made


def sheet(rows: Sequence[Row]) -> Sheet:
    """A line for each, also where nothing fits."""
    return Sheet("Planned and measured", HEAD, tuple(map(cells, rows)), labels=4)


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a line."""
    asked = row["asked"]
    host = f" and {asked['host']} of the host" if asked.get("host") else ""
    head = (f"{asked['memory']}{host}", f"{asked['length']:,}", str(asked["batch"]))
    if row.get("error"):
        return (*head, row["error"].partition(". ")[0], *["–"] * 5)
    if row.get("refused"):
        least = re.search(r"Give at least memory=([\w.]+)", row["refused"])
        said = f"refused: give {least[1]}" if least else f"refused: {row['refused']}"
        return (*head, said, *["–"] * 5)
    chosen, texts, memory = (row["plan"][name] for name in ("chosen", "texts", "memory"))
    prompt = texts["length"] - texts["new"]
    held = chosen["bytes"]["pages"] + chosen["bytes"]["beside"]
    return (
        *head,
        chosen["policy"] + " in tiers" * chosen["tiered"],
        "whole" if chosen["chunk"] >= prompt else f"{chosen['chunk']:,}",
        f"{readable(row['bytes_held'])} ({readable(held)})",
        readable(chosen["needed"]),
        readable(row["bytes_peak"]),
        "yes" if row["bytes_peak"] <= memory["given"] + memory["host"] else "no",
    )
