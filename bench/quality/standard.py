"""Tasks of lm-eval with several policies: a cell per task and policy, kept as soon as it is run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from kvpress.bench.quality.results import Cell, Results
from kvpress.bench.quality.suites import VISIBLE
from kvpress.bench.quality.tasks import LM_EVAL

from kvpress.errors import KVPressError


class HarnessError(KVPressError):
    """lm-eval is missing, or refuses what it is asked for."""


class LmEvalOptions(NamedTuple):
    """How tasks are run.

    folder: of task files. limit: documents per task. metadata: for tasks that make their own
    documents. chat: prompts go through the chat template. new_tokens: what may be generated, where
    it is not the task that says so.
    """

    folder: Path | None = None
    limit: int | None = None
    metadata: Mapping[str, Any] | None = None
    chat: bool = False
    new_tokens: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        folder = None if self.folder is None else str(self.folder)
        return {**self._asdict(), "folder": folder, "metadata": dict(self.metadata or {})}


def require() -> None:
    """Raises HarnessError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError(
            "lm-eval is not installed. Run: pip install kvpress-engine[eval], or use --suite."
        )


def fill(
    results: Results,
    model: Any,
    tokenizer: Any,
    policies: Sequence[str],
    tasks: Sequence[str],
    options: LmEvalOptions,
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> None:
    """Runs the cells that the results do not hold yet. A policy that fails is kept with its error.

    Raises HarnessError for tasks that lm-eval does not know, or whose data it cannot load.
    """
    require()
    from kvpress.bench.quality.harness import KVPressLM

    manager = _manager(tokenizer, tasks, options)
    for policy in policies:
        lm = None  # one model per policy, made only where something is left to run
        for task in tasks:
            cell = Cell(task, 0, 0, VISIBLE, policy, metric=LM_EVAL)
            if cell.key in results:
                continue
            lm = lm or KVPressLM(model, policy, tokenizer)
            filled = _filled(cell, lm, manager, options)
            results.add(filled)
            on_cell(filled)


def _manager(tokenizer: Any, tasks: Sequence[str], options: LmEvalOptions) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=None if options.folder is None else str(options.folder),
        metadata={"tokenizer": tokenizer.name_or_path, **(options.metadata or {})},
    )
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise HarnessError(
            f"lm-eval knows no task {', '.join(unknown)}. `lm_eval ls tasks` lists them; give files"
            " of your own with --task-folder."
        )
    return manager


def _filled(cell: Cell, lm: Any, manager: Any, options: LmEvalOptions) -> Cell:
    """The cell with all numbers of its task, and the bytes of all its documents together."""
    from lm_eval import simple_evaluate

    lm.ledger.clear()
    more = (
        {} if options.new_tokens is None else {"gen_kwargs": {"max_gen_toks": options.new_tokens}}
    )
    try:
        found = simple_evaluate(
            lm,
            tasks=[cell.task],
            task_manager=manager,
            limit=options.limit,
            apply_chat_template=options.chat,
            log_samples=False,
            **more,
        )
    except (ImportError, OSError) as error:  # of a task, which loads its data here
        raise HarnessError(
            f"lm-eval cannot load {cell.task}: {error}. Install what it asks for"
            " (lm-eval[ruler], lm-eval[longbench], lm-eval[math], …); data come from the hub."
        ) from error
    except Exception as error:  # whatever a policy does wrong, the other cells go on
        return replace(cell, error=f"{type(error).__name__}: {error}")
    counts = found.get("n-samples", {})
    scores = [
        {**score, "documents": counts.get(task, {}).get("effective")}
        for task, numbers in found["results"].items()
        for score in _of(task, numbers)
    ]
    return replace(cell, scores=scores, **lm.ledger.fields)


def _of(task: str, numbers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """lm-eval names a number `metric,filter` and its standard error `metric_stderr,filter`."""
    for name, value in numbers.items():
        metric, _, given_filter = name.partition(",")
        if isinstance(value, float | int) and given_filter and not metric.endswith("_stderr"):
            error = numbers.get(f"{metric}_stderr,{given_filter}")
            spread = error if isinstance(error, float) else None
            label = metric if given_filter == "none" else f"{metric}, {given_filter}"
            yield {"task": task, "label": label, "value": float(value), "error": spread}
