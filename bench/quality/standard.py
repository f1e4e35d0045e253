"""Tasks of lm-eval with several policies, in one table."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from kvpress.errors import KVPressError


class HarnessError(KVPressError):
    """lm-eval is missing, or refuses what it is asked for."""


class Row(NamedTuple):
    """One metric of one task under one policy; error: its standard error, where lm-eval has one."""

    task: str
    metric: str
    policy: str
    value: float
    error: float | None


def rows(
    model: Any,
    tokenizer: Any,
    policies: Sequence[str],
    tasks: Sequence[str],
    folder: Path | None = None,
    limit: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> list[Row]:
    """The numbers of every task, metric and policy. folder: of task files. Raises HarnessError.

    metadata: for tasks that make their own documents, which take the tokenizer from there too.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError(
            "lm-eval is not installed. Run: pip install kvpress-engine[eval], or use --suite."
        )
    from kvpress.bench.quality.harness import KVPressLM
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=None if folder is None else str(folder),
        metadata={"tokenizer": tokenizer.name_or_path, **(metadata or {})},
    )
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise HarnessError(
            f"lm-eval knows no task {', '.join(unknown)}. `lm_eval ls tasks` lists them; give files"
            " of your own with --task-folder."
        )
    made = []
    for policy in policies:
        judged = KVPressLM(model, policy, tokenizer)
        try:
            found = simple_evaluate(
                judged, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
            )
        except (ImportError, OSError) as error:  # of a task, which loads its data here
            raise HarnessError(
                f"lm-eval cannot load {', '.join(tasks)}: {error}. Install what it asks for"
                " (lm-eval[ruler], lm-eval[longbench], lm-eval[math], …); data come from the hub."
            ) from error
        made += [
            row for task, numbers in found["results"].items() for row in _of(task, policy, numbers)
        ]
    return made


def _of(task: str, policy: str, numbers: dict[str, Any]) -> list[Row]:
    """lm-eval names a number `metric,filter` and its standard error `metric_stderr,filter`."""
    made = []
    for name, value in numbers.items():
        metric, _, given_filter = name.partition(",")
        if isinstance(value, float | int) and given_filter and not metric.endswith("_stderr"):
            error = numbers.get(f"{metric}_stderr,{given_filter}")
            made.append(
                Row(task, metric, policy, float(value), error if isinstance(error, float) else None)
            )
    return made


def table(rows: Sequence[Row]) -> Table:
    """One line per task, metric and policy."""
    made = Table(title="lm-eval, question visible while compressing", title_justify="left")
    for name in ("task", "metric", "policy"):
        made.add_column(name, overflow="fold")
    made.add_column("value ± standard error", justify="right")
    for row in rows:
        spread = "" if row.error is None else f" ± {row.error:.4f}"
        made.add_row(row.task, row.metric, row.policy, f"{row.value:.4f}{spread}")
    return made
