"""Tables of time and memory, from what `kvpress bench` recorded. Times are medians."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvpress.bench.common.journal import Row, read
from kvpress.bench.docs import record_heads
from kvpress.bench.docs.tables import RESULTS, code, percent, table
from kvpress.bench.sparse import report as sparse
from kvpress.bench.speed.rows import by_cell

BASELINE = "transformers"
_MIB = 2**20


def rows(file: str, bench: str, batch: int) -> dict[str, Row]:
    """What one benchmark says of each candidate at a batch."""
    cells = by_cell(read(RESULTS / file))
    (found,) = (rows for cell, rows in cells.items() if (cell.bench, cell.batch) == (bench, batch))
    return found


def _decode(file: str) -> str:
    """Steps of a batch of 8 beside the engine's own full cache.

    transformers' cache is left out: at this batch its step is mostly the allocator's.
    """
    found = rows(file, "decode", 8)
    full = found["full"]
    head = ("", "ms", "MiB of cache", "bytes of `full`", "over `full`", "attention over `full`")
    return table(
        head,
        (
            (
                code(name),
                f"{1e3 * _median(row):.0f}",
                f"{row['bytes_held'] / _MIB:.0f}",
                percent(row["bytes_held"] / full["bytes_held"]),
                f"{_median(full) / _median(row):.2f}×",
                f"{full['attention']['median'] / row['attention']['median']:.2f}×",
            )
            for name, row in found.items()
            if name != BASELINE
        ),
    )


def _single() -> str:
    """Steps of one sequence, where nothing but the caches differs."""
    found = rows("decode-8000.jsonl", "decode", 1)
    lines = (
        (code(name), f"{1e3 * _median(row):.0f}", f"{row['bytes_held'] / _MIB:.0f}")
        for name, row in found.items()
    )
    return table(("", "ms", "MiB of cache"), lines)


def _prefill(file: str) -> str:
    """Time to first token, and in brackets the range of the rounds."""
    lines = (
        (
            code(name),
            f"{_median(row):.1f} ({row['seconds']['low']:.1f}–{row['seconds']['high']:.1f})",
            f"{row['bytes_held'] / _MIB:.0f}",
        )
        for name, row in rows(file, "prefill", 1).items()
    )
    return table(("", "first token, s", "MiB of cache"), lines)


def _peers() -> str:
    """All candidates at one length: bytes, time and quality."""
    steps = rows("peers-500.jsonl", "decode", 1)
    first = rows("peers-500.jsonl", "prefill", 1)
    base = steps[BASELINE]["bytes_held"]
    lines = (
        (
            code(name),
            percent(row["bytes_held"] / base),
            f"{1e3 * _median(first[name]):.0f}",
            f"{1e3 * _median(row):.0f}",
            _score(row["quality"][0]),
            f"{row['quality'][0]['kl']:.3f}",
        )
        for name, row in steps.items()
    )
    return table(("", "bytes kept", "first token, ms", "step, ms", "copy, %", "KL"), lines)


def _memory() -> str:
    """What fits under a cap, the process and its weights included."""
    found = rows("memory-2000.jsonl", "memory", 1)
    lines = (
        (code(name), f"{row['bytes_held'] / _MIB:.0f}", str(row["largest_batch"]))
        for name, row in found.items()
    )
    return table(("", "MiB of cache, one sequence", "sequences that fit"), lines)


def _quarter() -> str:
    """What the recorded rows of a quarter hold of a full cache of the same dtype, by arithmetic.

    Of fp32 without scores and in pages of 16 it is what the ledger said, less 16 bytes a row.
    """
    seen = record_heads.read()
    lines = []
    for stored, wide in (("fp32", 2 * 64 * 4), ("bf16", 2 * 64 * 2)):
        for kept, beside, free in (("positions", 4, 0), ("positions, scores", 8, 1)):
            rows = [n for layer in seen.slots for n in layer]
            full = len(rows) * seen.tokens_seen * wide
            parts = [sum(rows) * wide / full, sum(rows) * beside / full]
            for page in (16, 32, 64):  # free: where every decoded token evicts one
                used = [[-(-(n + free) // page) for n in layer] for layer in seen.slots]
                pages = sum(map(sum, used))
                tables = sum(4 * len(layer) * max(layer) for layer in used)
                parts += [(pages * page * (wide + beside) + tables) / full]
            lines.append((f"{stored}, {kept}", *(percent(x, 1) for x in parts)))
    head = ("", "keys and values", "beside them", "held, pages of 16", "of 32", "of 64")
    return table(head, lines)


def _small_rows() -> str:
    """What packed rows hold in multiples of their arithmetic, before pages shrank and since."""
    lines = []
    for row in _json("small-rows.json")["rows"]:
        parts = ("held_before", "held", "full_width", "part_filled", "tables")
        shares = [row[name] / row["arithmetic"] for name in parts]
        shares += [row[name] / row["later_arithmetic"] for name in ("later_before", "later")]
        name = f"{row['tokens']:,} tokens, {row['budget']}, {row['rows']}"
        lines.append((name, f"{row['arithmetic'] / 1024:.0f}", *(f"{x:.2f}×" for x in shares)))
    head = ("prompt, budget, rows", "KiB", "before", "now", "of it: at full width")
    rest = ("part-filled pages", "tables, queries", "40 tokens later, before", "now")
    return table((*head, *rest), lines)


def _packed_operator() -> str:
    """`decode_rows` over packed pages: how many times as fast as over bf16 pages."""
    record = _json("ops-packed.json")
    names = ("bits8", "bits4", "bits2", "keep0.6", "keep0.6_bits4")
    head = ("shape", "8 bits", "4 bits", "2 bits", "0.6 of the key channels", "both, 4 bits")
    lines = []
    for case in record["cases"]:
        took = {name: entry["median"] for name, entry in case["candidates"].items() if entry}
        gains = (f"{took['unpacked'] / took[name]:.2f}×" for name in names)
        lines.append((case["name"], *gains))
    return table(head, lines)


def _sparse() -> str:
    """Attention of single layers together, beside PyTorch's."""
    lines = []
    for file in ("sparse-8000.json", "sparse-long.json"):
        for one in sparse.totals(sparse.rows_of(_json(file))):
            lines.append(
                (
                    f"{one.tokens:,}",
                    str(one.layers),
                    f"{one.exact:.1f}",
                    f"{one.estimate + one.attend:.1f}",
                    f"{one.gain:.2f}×",
                    percent(one.estimate / one.exact),
                    percent(one.density),
                    percent(one.error, 1),
                )
            )
    head = ("tokens", "layers", "SDPA, s", "`sale`, s", "speed-up", "estimate, of SDPA's time")
    return table((*head, "blocks computed", "error of the output"), lines)


def _kernels() -> str:
    """Every Triton kernel, compiled without a GPU: the worst of its specialisations by target."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for entry in _json("gpu-compile.json")["kernels"]:
        found.setdefault(entry["kernel"], {}).setdefault(entry["target"], []).append(entry)
    targets = list(dict.fromkeys(target for each in found.values() for target in each))
    lines = (
        (code(name), *(_worst(by_target[target]) for target in targets))
        for name, by_target in found.items()
    )
    return table(("registers, spilled bytes, occupancy", *targets), lines)


def _worst(entries: Sequence[Mapping[str, Any]]) -> str:
    most, spilled = (max(e[name] for e in entries) for name in ("registers", "spill_bytes"))
    return f"{most}, {spilled}, {percent(min(e['occupancy'] for e in entries))}"


def why() -> str:
    """The README's four rows: what is measured of each, linked to the command that shows it."""
    steps = rows("peers-500.jsonl", "decode", 1)
    base = steps[BASELINE]["bytes_held"]
    fits = rows("memory-2000.jsonl", "memory", 1)
    names = ("keyformer:budget=0.5", BASELINE, "nvidia/SnapKVPress:budget=0.5")
    measured = [steps[name] for name in names]
    held = [percent(row["bytes_held"] / base) for row in measured]
    copies = [_score(row["quality"][0]) for row in measured]
    took = [f"{1e3 * _median(row):.0f} ms" for row in measured]
    batch = [str(fits[name]["largest_batch"]) for name in names[:2]]
    head = ("", "here", "`DynamicCache`", "NVIDIA's kvpress", "`StaticCache`")
    return table(
        head,
        (
            ("bytes held", *_linked(held, "peers"), "what was reserved"),
            ("copies right, %", *_linked(copies, "peers"), "as `DynamicCache`"),
            ("one decode step", *_linked(took, "peers"), "not measured"),
            ("sequences in 1,500 MiB", *_linked(batch, "cap"), "not measured", "not measured"),
        ),
    )


def _linked(texts: Sequence[str], command: str) -> list[str]:
    return [f"[{text}][{command}]" for text in texts]


def _score(asked: Mapping[str, Any]) -> str:
    return f"{100 * asked['score']:.0f}"


def _median(row: Row) -> float:
    median: float = row["seconds"]["median"]
    return median


def _json(file: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return record


PARTS: Mapping[str, Callable[[], str]] = {
    "why": why,
    "decode": lambda: _decode("decode-8000.jsonl"),
    "decode-single": _single,
    "decode-packed": lambda: _decode("decode-packed.jsonl"),
    "prefill": lambda: _prefill("prefill-8000.jsonl"),
    "prefill-sparse": lambda: _prefill("prefill-sparse.jsonl"),
    "peers": _peers,
    "memory": _memory,
    "packed-operator": _packed_operator,
    "small-rows": _small_rows,
    "quarter": _quarter,
    "sparse": _sparse,
    "kernels": _kernels,
}
