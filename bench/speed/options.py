"""Options that the benchmarks of models share, and the grid that they span."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from kvpress.bench.common.options import chosen_device

Policies = Annotated[list[str], typer.Option("--policy", help="name:key=value,… ; repeatable.")]
Budgets = Annotated[
    list[str],
    typer.Option("--budget", help="For policies that name none; repeat for each of several."),
]
Lengths = Annotated[list[int], typer.Option("--tokens", help="Of a prompt; repeatable.", min=64)]
Batches = Annotated[
    list[int], typer.Option("--batch", help="Sequences together; repeatable.", min=1)
]
Baselines = Annotated[
    list[str] | None,
    typer.Option(
        "--baseline",
        help="transformers (its DynamicCache), transformers-malloc (the same, its allocator keeping"
        " large blocks), transformers-static (StaticCache); repeatable.",
        show_default="all of them, where they can be",
    ),
]
Rounds = Annotated[int, typer.Option(help="Timed rounds.", min=1)]
Warmup = Annotated[int, typer.Option(help="Rounds that are not timed.", min=0)]
Out = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines, to which rows are added; a run goes on from what is there.",
        show_default="none",
    ),
]


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """What all cells of a benchmark have in common, and where its rows go."""

    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="For policies that name none; repeat for each of several.", show_default="none"
        ),
    ] = None
    cache_dtype: Annotated[
        str | None, typer.Option(help="Storage of keys and values.", show_default="the model's")
    ] = None
    with_eval: Annotated[
        bool,
        typer.Option("--with-eval", help="Also copies from compressed contexts: a score per row."),
    ] = False
    out: Out = None


def baselines(name: str, given: Sequence[str] | None, loading: Any, alone: bool) -> list[str]:
    """What a benchmark compares with, besides policies. Raises typer.BadParameter.

    alone: whether one process runs the model. Without one that was asked for, those that steps and
    whole calls can be compared with: malloc is of no matter on a GPU.
    """
    from kvpress.bench.common.candidates import BASELINE, CACHES, MALLOC, RIVALS, STATIC

    if given:
        allowed = list(dict.fromkeys([*RIVALS, *CACHES]))
        if unknown := [one for one in given if one not in allowed]:
            raise typer.BadParameter(f"--baseline {unknown[0]}: allowed: {', '.join(allowed)}.")
        return list(dict.fromkeys(given))
    if name not in ("decode", "throughput") or not alone:
        return [BASELINE]
    on_cpu = (
        loading.source.device_map is None and chosen_device(loading.source.device).type == "cpu"
    )
    return [BASELINE, *([MALLOC] if on_cpu else []), STATIC]


def with_budgets(policies: Sequence[str], budgets: Sequence[str]) -> Iterator[str]:
    """Every policy, at every budget where it takes one and names none. Raises PolicyError.

    A name of one of transformers' caches stays as it is.
    """
    from kvpress.bench.common.candidates import CACHES, RIVALS

    from kvpress.policy.loading import parse

    for text in policies:
        if text in CACHES or text in RIVALS:
            yield text
            continue
        recipe = parse(text)
        takes = len(recipe.policies) == 1 and hasattr(recipe.policies[0], "budget")
        if not (budgets and takes) or "budget=" in text:
            yield text
            continue
        for budget in budgets:
            made = f"{text}{',' if '=' in text else ':'}budget={budget}"
            parse(made)
            yield made
