"""Tables of what a model still knows of a compressed context, as `kvpress eval` recorded it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from kvpress.bench.docs.tables import RESULTS, code, percent, table
from kvpress.bench.quality import table as evaluation
from kvpress.bench.quality.results import load

BLIND = "no context"


class Column(NamedTuple):
    """What a column shows of which task: `score`, `kl`, `nll` or `kept`."""

    title: str
    task: str
    tokens: int = 1024
    protocol: str = "hidden"
    shows: str = "score"


_OFFLINE = (
    Column("copy 2,048", "copy", 2048),
    Column("needle, hidden", "needle"),
    Column("needle, visible", "needle", protocol="visible"),
    Column("needles-2, hidden", "needles-2"),
    Column("needles-4, hidden", "needles-4"),
    Column("facts, visible", "facts", protocol="visible"),
)
_TEXT = (Column("bytes", "perplexity", shows="kept"), Column("text, KL", "perplexity", shows="kl"))
_MERGED = (*_TEXT, Column("copy", "copy"))
_PACKED = (*_TEXT, *(Column(name, name) for name in ("copy", "needle", "needles-4", "facts")))
_KEYFORMER = (
    Column("bytes", "copy", shows="kept"),
    *(Column(name, name) for name in ("copy", "needle", "needles-2", "needles-4")),
)
_SPARSE = (
    Column("text, NLL", "perplexity", 7400, shows="nll"),
    *(Column(n, n, 7400) for n in ("copy", "needle", "needles-2", "needles-4", "facts")),
    *(Column(f"{n}, NLL", n, 7400, shows="nll") for n in ("pairs", "variables")),
)
_STEPS = tuple(
    Column(f"text, {shows.upper()}", "perplexity", shows=shows) for shows in ("nll", "kl")
)
_FILES = tuple(
    Column(f"{name}, NLL", name, 2048, "visible", "nll") for name in ("lcc", "multi_news", "qasper")
)


def _recorded(file: str, columns: Sequence[Column], policies: Sequence[str]) -> str:
    """A line per policy, in the words in which it was evaluated."""
    found = lines(file)
    rows = []
    for policy in policies:
        by_task = (found[c.task, c.tokens, c.protocol].get(policy) for c in columns)
        cells = (_cell(c, line) for c, line in zip(columns, by_task, strict=True))
        rows.append([policy if policy == BLIND else code(policy), *cells])
    return table(["", *(column.title for column in columns)], rows)


@cache
def lines(file: str) -> dict[tuple[str, int, str], dict[str, evaluation.Line]]:
    """The lines of every task, length and protocol, by policy."""
    return {
        (block.task, block.tokens, block.protocol): {line.policy: line for line in block.lines}
        for block in evaluation.blocks(load(RESULTS / file))
    }


def _cell(column: Column, line: evaluation.Line | None) -> str:
    if line is None or line.score is None:
        return "–"
    if column.shows == "score":
        return str(line.score)
    value = line.nll.mean if column.shows == "nll" and line.nll else getattr(line, column.shows)
    if value is None:
        return "–"
    return percent(value) if column.shows == "kept" else f"{value:.2f}"


def _at(budget: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{name}:budget={budget}" for name in names)


_BUDGETED = ("streaming_llm", "snapkv", "h2o", "keyformer", "tova", "knorm", "random", "d2o")
_D2O = ("threshold=2.0", "merge_keys=unrotated", "merge_keys=values_only", "count_bias=true")
_BITS = "quant:key_bits={},value_bits={}"
_FORMATS = (
    "full",
    *(_BITS.format(*bits) for bits in ((8, 8), (4, 4), (4, 2), (2, 2))),
    "quant:key_bits=2,value_bits=2,guard=none",
    *(f"transformers-{kind}" for kind in ("fp8", "int4", "int2")),
    *(f"think:keep={keep}" for keep in (0.8, 0.6, 0.5)),
    "keyformer:budget=0.5",
    "keyformer:budget=0.5+think:keep=0.6+quant:key_bits=4,value_bits=4",
    BLIND,
)

PARTS: Mapping[str, Callable[[], str]] = {
    "quality-bytes": lambda: by_bytes(),
    "quality-offline": lambda: _recorded(
        "quality-offline.jsonl",
        _OFFLINE,
        ("full", *_at("0.5", "keyformer", "h2o", "snapkv", "streaming_llm", "random"), BLIND),
    ),
    "quality-keyformer-h2o": lambda: _recorded(
        "quality-keyformer-h2o.jsonl",
        _KEYFORMER,
        ("full", *_at("0.65", "keyformer", "h2o"), BLIND),
    ),
    "quality-d2o": lambda: _recorded(
        "quality-d2o.jsonl",
        _MERGED,
        (
            *_at("0.2", "streaming_llm", "snapkv", "h2o", "keyformer", "d2o"),
            *(f"d2o:budget=0.2,{option}" for option in (*_D2O, "layers=uniform")),
        ),
    ),
    "quality-packed": lambda: _recorded("quality-packed.jsonl", _PACKED, _FORMATS),
    "quality-sparse": lambda: _recorded("quality-sparse.jsonl", _SPARSE, ("full", "sale")),
    "quality-steps": lambda: _recorded(
        "quality-steps.jsonl",
        _STEPS,
        ("full", *_at("0.25", "keyformer", "h2o"), *_at("0.25+heads", "keyformer", "h2o"), BLIND),
    ),
    "quality-files": lambda: _recorded(
        "minilongbench.jsonl", _FILES, ("full", *_at("0.5", "snapkv", "random"), BLIND)
    ),
}

BYTES = "quality-bytes.jsonl"
BUDGETS = ("0.1", "0.2", "0.35", "0.5", "0.75")


def by_bytes() -> str:
    """Copies at five budgets: the curves of the picture, with their intervals."""
    found = lines(BYTES)["copy", 1024, "hidden"]
    rows = [
        [code(name), *(str(found[f"{name}:budget={budget}"].score) for budget in BUDGETS)]
        for name in _BUDGETED
    ]
    return table(["", *(f"{float(budget):.0%}" for budget in BUDGETS)], rows)


def curves() -> dict[str, list[tuple[float, float]]]:
    """Bytes held, of those of the full cache, and right tokens of copies, by policy and budget."""
    found = lines(BYTES)["copy", 1024, "hidden"]
    return {
        name: [_point(found[f"{name}:budget={budget}"]) for budget in BUDGETS] for name in _BUDGETED
    }


def points() -> dict[str, tuple[float, float]]:
    """The same of everything that takes no budget; transformers' caches are of an earlier run."""
    own = lines(BYTES)["copy", 1024, "hidden"]
    other = lines("quality-packed.jsonl")["copy", 1024, "hidden"]
    found = {
        name: line
        for name, line in own.items()
        if "+" in name or name.split(":")[0] not in _BUDGETED
    }
    found |= {name: line for name, line in other.items() if name.startswith("transformers-")}
    return {name: _point(line) for name, line in found.items()}


def _point(line: evaluation.Line) -> tuple[float, float]:
    score = 0.0 if line.score is None else line.score.mean
    return line.kept or 0.0, score
