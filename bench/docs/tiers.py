"""Tables of tiers, from what `kvpress bench tiers` recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from kvpress.bench.docs.tables import RESULTS, code, percent, table
from kvpress.bench.tiers import report
from kvpress.bench.tiers.steps import UNTIERED

MODEL, LAYER, SESSION = "tiers-8000.json", "tiers-one-layer.json", "tiers-million.json"
_MISSING = "Not recorded yet."
_MIB = 2**20


def _made(file: str, make: Callable[[dict[str, Any]], str]) -> str:
    """A part of a record, where there is one already."""
    path = RESULTS / file
    if not path.is_file():
        return _MISSING
    record = json.loads(path.read_text(encoding="utf-8"))
    return f"{_said(record, file)}\n\n{make(record)}"


def _said(record: Mapping[str, Any], file: str) -> str:
    settings, place = record["settings"], record["environment"]
    caps = settings["caps"]
    batch = f", batch {settings['batch']}" if "batch" in settings else ""
    where = place["cpu"] if place["device"] == "cpu" else place["device"]
    return (
        f"{settings['tokens']:,} tokens{batch}; device {caps['device']}, host {caps['host']}, the"
        f" rest on disk; {where}, {place['threads']} threads; `bench/results/{file}`:"
    )


def _steps(record: Mapping[str, Any]) -> str:
    """Decode steps in turn: medians, and in brackets the range of the rounds."""
    rows = report.good(record["candidates"])
    cells = {name: report.step_cells(rows.get(UNTIERED), row) for name, row in rows.items()}
    head = ("", "step, ms", "over no tiers", "waited, ms", "from disk, MiB", "prompt, s")
    lines = (
        (name, f"{ms} ({spread})", against, *rest[:3])
        for name, (ms, spread, against, *rest) in cells.items()
    )
    return table((*head, "same tokens, same bits"), _with_last(lines, cells))


def _with_last(lines: Any, cells: Mapping[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [(*line, cell[-1]) for line, cell in zip(lines, cells.values(), strict=True)]


def _layer(record: Mapping[str, Any]) -> str:
    """One layer: medians of a step, the range, and how far outputs are from no tiers."""
    rows = report.good(record["candidates"])
    base = rows.get(UNTIERED)
    lines = []
    for name, row in rows.items():
        ms, spread, against, _, fill, error, same = report.layer_cells(base, row)
        lines.append((name, f"{ms} ({spread})", against, fill, error, same))
    return table(("", "step, ms", "over no tiers", "filled in, s", "error", "same bits"), lines)


def _memory(record: Mapping[str, Any]) -> str:
    """The process that decodes under the caps."""
    row = record["memory"]
    above = row["bytes_peak_decode"] - row["bytes_before"]
    line = (
        f"{row['caps'] / _MIB:.0f}",
        f"{row['bytes_before'] / _MIB:.0f}",
        f"{(row['bytes_peak_prefill'] - row['bytes_before']) / _MIB:.0f}",
        f"{above / _MIB:.0f}",
        percent(above / row["caps"]),
    )
    head = ("", "caps, MiB", "before, MiB", "prompt adds at most", "steps add at most", "of caps")
    return table(head, [("resident bytes", *line)])


def _disk(record: Mapping[str, Any]) -> str:
    """Reads of the same records in turn."""
    row = record["disk"]
    lines = [(code(name), f"{rate / _MIB:.0f}") for name, rate in row["rates"].items()]
    lines.append(("the store over the best plain rate", percent(row["share_of_raw"])))
    lines.append(("checksums, of reading and verifying", percent(row["checksum"])))
    return table((f"records of {row['record_bytes'] // 1024} KiB", "MiB/s"), lines)


def _session(record: Mapping[str, Any]) -> str:
    """A session that is filled, saved and loaded: seconds and resident memory of each part."""
    lines = [
        (name, f"{part['seconds']:.1f}", f"{part['peak_mib']:,}")
        for name, part in record["parts"].items()
    ]
    sizes = ", ".join(f"{name} {size:,}" for name, size in record["mib"].items())
    same = "the same" if record["same_bits"] else "not the same"
    said = f"MiB: {sizes}. Bits of outputs before and after: {same}; against torch in fp32:"
    head = ("", "s", "resident at most, MiB")
    return f"{table(head, lines)}\n\n{said} Σ|o − o'| / Σ|o| = {record['error']:.1e}."


PARTS: Mapping[str, Callable[[], str]] = {
    "tiers": lambda: _made(MODEL, _steps),
    "tiers-memory": lambda: _made(MODEL, _memory),
    "tiers-disk": lambda: _made(MODEL, _disk),
    "tiers-layer": lambda: _made(LAYER, _layer),
    "tiers-session": lambda: _made(SESSION, _session),
}
