"""Records what each head keeps of one prompt: `python -m kvpress.bench.docs.record`.

The prompt is the beginning of Python's language reference and a question about it, as in
`kvpress view`; the answer is decoded greedily.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from kvpress.bench.docs.tables import RESULTS

POLICY, TOKENS, NEW_TOKENS = "keyformer:budget=0.2", 400, 24
PATH = RESULTS / "kept.json"


class Map(NamedTuple):
    """What is drawn. positions: `[layer][KV head]`, sorted; bytes are those of all layers."""

    policy: str
    prompt_tokens: int
    tokens_seen: int
    bytes_held: int
    bytes_full: int
    positions: list[list[list[int]]]


def read() -> Map:
    """The recorded map."""
    recorded: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return Map(**{name: recorded[name] for name in Map._fields})


def record() -> None:
    """Runs the demo model and writes the map, with where it was made."""
    import torch
    from kvpress.bench.common import models
    from kvpress.bench.common.environment import environment
    from kvpress.bench.common.prompt import reference_prompt
    from kvpress.bench.view.kept import look

    model, tokenizer = models.load("demo")
    prompt = reference_prompt(tokenizer, TOKENS)
    kept = look(model, tokenizer, prompt, POLICY, name="demo", max_new_tokens=NEW_TOKENS)
    made = Map(
        POLICY,
        kept.prompt_tokens,
        kept.tokens_seen,
        kept.report.bytes_held,
        kept.report.bytes_full,
        kept.positions,
    )
    content = {**made._asdict(), "environment": environment(torch.device("cpu"))}
    PATH.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
