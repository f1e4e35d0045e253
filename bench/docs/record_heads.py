"""Records the budget of every head: `python -m kvpress.bench.docs.record_heads [POLICY]`.

The prompt is the beginning of Python's language reference and a question about it, as in
`kvpress view`.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NamedTuple

from kvpress.bench.docs.tables import RESULTS

POLICY, TOKENS = "snapkv:budget=0.25+heads", 2000
PATH = RESULTS / "heads.json"


class Budgets(NamedTuple):
    """What is drawn. slots: `[layer][KV head]`; bytes are those of all layers."""

    policy: str
    tokens_seen: int
    bytes_held: int
    bytes_full: int
    slots: list[list[int]]


def read() -> Budgets:
    """The recorded budgets."""
    recorded: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return Budgets(**{name: recorded[name] for name in Budgets._fields})


def record(policy: str) -> None:
    """Runs the demo model and writes the budgets, with where they were made."""
    import torch
    from kvpress.bench.common import models
    from kvpress.bench.common.environment import environment
    from kvpress.bench.common.prompt import reference_prompt
    from kvpress.bench.view.kept import look

    model, tokenizer = models.load("demo")
    prompt = reference_prompt(tokenizer, TOKENS)
    kept = look(model, tokenizer, prompt, policy, name="demo", max_new_tokens=1)
    report = kept.report
    made = Budgets(policy, kept.tokens_seen, report.bytes_held, report.bytes_full, kept.slots_kept)
    content = {**made._asdict(), "environment": environment(torch.device("cpu"))}
    PATH.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(*(sys.argv[1:] or [POLICY]))
