"""What a report of tiers says: steps, memory under the caps, the disk beside plain reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvpress.bench.common.journal import Row
from kvpress.bench.common.report import Report, Sheet, machine, settings_of
from kvpress.bench.speed.rows import milliseconds, times
from kvpress.bench.tiers.steps import CAPPED, UNTIERED

from kvpress.store.tiers.tiers import TIERS

KIND = "tiers"  # the value of "bench" in a record
MIB = 2**20
STEPS = ("candidate", "ms", "low–high", "against", "waited ms", "disk MiB", "prompt s", "same")
LAYER = ("candidate", "ms", "low–high", "against", "disk MiB", "fill s", "error", "same")
CHOICE = (
    "over exact",
    "loaded MiB",
    "hits",
    "tokens read",
    "again",
    "ahead",
    "vain",
)  # where a policy chooses pages
LEGEND = (
    "ms: one decode step; against: the time of the step without tiers over this; waited ms: of"
    " attention, for pages; disk MiB: read from the disk, per step for a whole model, in all for"
    " one layer; prompt s: reading the prompts, which is what recomputing takes; same: tokens equal"
    " to those without tiers, and logits or outputs equal to the last bit to those of tiers with"
    " all on the device; error: Σ|o − o'| / Σ|o| against no tiers. Where a policy reads some pages"
    " only: over exact: the time of a step that streams everything under the caps over this; loaded"
    " MiB: to the device, per step; hits: pages of a step on the device, on the host, on disk;"
    " tokens read: of a row per step; again: of the pages that a step chose, those that the step"
    " before had chosen for the same row; ahead: of those that were missing, those that were there"
    " or on their way when they were chosen; vain: pages per step that were loaded ahead and not"
    " chosen."
)


def to_record(
    case: str, found: Mapping[str, Any], environment: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Plain values, ready for JSON. found: rows by candidate; memory and disk where measured."""
    head = {"bench": KIND, "case": case, "environment": environment, "settings": settings}
    return {**head, **found}


def report(record: Mapping[str, Any]) -> Report:
    """All sheets of a record."""
    facts = [*settings_of(record["settings"]), *machine(record["environment"])]
    return Report("Tiers", facts, [LEGEND], list(sheets(record)), list)


def sheets(record: Mapping[str, Any]) -> Iterator[Sheet]:
    """Steps, memory, disk."""
    rows: dict[str, Row] = record["candidates"]
    whole = record["case"] == "model"
    cells, head = (step_cells, STEPS) if whole else (layer_cells, LAYER)
    shown: tuple[str, ...] = head
    base, measured = rows.get(UNTIERED), good(rows)
    lines = [(name, *cells(base, row)) for name, row in measured.items()]
    if chooses(rows):
        exact, shown = measured.get(CAPPED), (*head, *CHOICE)
        more = (choice_cells(exact, row) for row in measured.values())
        lines = [(*line, *own) for line, own in zip(lines, more, strict=True)]
    notes = tuple(f"{name}: {row['error']}" for name, row in rows.items() if row.get("error"))
    title = "Decode steps" if whole else "One layer"
    yield Sheet(title, shown, tuple(lines), notes + tuple(_not_measured(record)))
    if record.get("memory"):
        yield memory_sheet(record["memory"])
    if record.get("disk"):
        yield disk_sheet(record["disk"])


def good(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Those that were measured."""
    return {name: row for name, row in rows.items() if not row.get("error")}


def _not_measured(record: Mapping[str, Any]) -> Iterator[str]:
    if record["case"] == "model" and record["environment"].get("device") == "cpu":
        yield "transformers' offloaded cache needs a GPU: not measured."


def step_cells(base: Row | None, row: Row) -> tuple[str, ...]:
    """The cells of a line, as in STEPS."""
    per = row["per_step"]
    tokens, bits = ("yes" if row[name] else "no" for name in ("same_tokens", "same_logits"))
    return (
        *_times(base, row),
        f"{1e3 * per['stalls']:.0f}" if per else "–",
        f"{per['disk to host'] / MIB:.0f}" if per else "–",
        f"{row['prompt_seconds']:.1f}",
        f"{tokens}, {bits}" if row.get("tiers") else tokens,
    )


def chooses(rows: Mapping[str, Row]) -> bool:
    """Whether one of the candidates reads some pages only."""
    return any(row.get("reads") for row in rows.values())


def choice_cells(exact: Row | None, row: Row) -> tuple[str, ...]:
    """The cells of a line, as in CHOICE. exact: the row of streaming everything."""
    per, reads = row["per_step"], row.get("reads")
    ratio = exact["seconds"]["median"] / row["seconds"]["median"] if exact else None
    hits = [per[f"hits {name}"] for name in TIERS] if per else []
    pages = max(1.0, sum(hits))
    return (
        times(ratio) if row.get("tiers") else "–",
        f"{per['host to device'] / MIB:.1f}" if per else "–",
        f"{' / '.join(f'{100 * n / pages:.0f}' for n in hits)} %" if hits else "–",
        f"{reads['tokens_read']:,.0f}" if reads else "all",
        *_moves(per if reads else {}),
    )


def _moves(per: Mapping[str, float]) -> Iterator[str]:
    """The last cells of a line, as in CHOICE."""
    for part, whole in (("again", "adjacent"), ("ahead", "missing")):
        yield f"{100 * per[part] / per[whole]:.0f} %" if per.get(whole) else "–"
    yield f"{per['vain']:.0f}" if per.get("missing") else "–"


def layer_cells(base: Row | None, row: Row) -> tuple[str, ...]:
    """The cells of a line, as in LAYER."""
    ways = (row["tiers"] or {}).get("ways")
    error, same = row.get("error_of_outputs"), row.get("same_bits")
    return (
        *_times(base, row),
        f"{ways['disk to host']['bytes'] / MIB:.0f}" if ways else "–",
        f"{row['fill_seconds']:.1f}",
        "–" if error is None else f"{error:.1e}",
        "–" if same is None or not ways else "yes" if same else "no",
    )


def _times(base: Row | None, row: Row) -> tuple[str, str, str]:
    taken = row["seconds"]
    spread = "–".join(milliseconds(taken[name]) for name in ("low", "high"))
    ratio = base["seconds"]["median"] / taken["median"] if base and base.get("seconds") else None
    return milliseconds(taken["median"]), spread, times(ratio)


def memory_sheet(row: Row) -> Sheet:
    """Peaks of the process, less what was there before the first prompt."""
    if row.get("error"):
        return Sheet("Memory of a process", ("MiB",), (), (f"failed: {row['error']}",))
    before, resident = row["bytes_before"], row["resident"]
    head = ("caps MiB", "before", "prefill", "decode", "above before", "of the caps", "grows by")
    line = (
        f"{row['caps'] / MIB:.0f}",
        *(f"{row[name] / MIB:.0f}" for name in ("bytes_before", *_PEAKS)),
        f"{(row['bytes_peak_decode'] - before) / MIB:.0f}",
        f"{(row['bytes_peak_decode'] - before) / row['caps']:.0%}",
        f"{(resident[-1] - resident[len(resident) // 2]) / MIB:.1f}",
    )
    note = "grows by: over the second half of the decoded tokens; before: weights included."
    return Sheet(f"Memory of a process, {CAPPED}, MiB", head, (line,), (note,), labels=0)


_PEAKS = ("bytes_peak_prefill", "bytes_peak_decode")


def disk_sheet(row: Row) -> Sheet:
    """Rates of reading the same records."""
    kind = "past the page cache" if row["direct"] else "through the page cache"
    size = f"{row['records']:,} records of {row['record_bytes'] / 1024:.0f} KiB, {kind}"
    lines = tuple(
        (name, f"{rate / MIB:.0f}", "–".join(f"{_rate(row, name, x):.0f}" for x in ("high", "low")))
        for name, rate in row["rates"].items()
    )
    notes = (
        f"The store reads at {row['share_of_raw']:.0%} of the best plain rate; checksums are"
        f" {row['checksum']:.0%} of the time in which a thread reads and verifies a record.",
    )
    return Sheet(f"The disk: {size}", ("read by", "MiB/s", "low–high"), lines, notes)


def _rate(row: Row, name: str, which: str) -> float:
    seconds = row["seconds"][name]
    return float(row["rates"][name] * seconds["median"] / seconds[which] / MIB)
