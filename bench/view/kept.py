"""What a policy kept of one prompt and its answer, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from kvpress.bench.common.prompt import PromptError, check_positions
from kvpress.bench.view.pieces import pieces, special
from kvpress.bench.view.reads import read_positions

import kvpress
from kvpress.report import Report


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Tokens, and the positions of those that each row still holds.

    model: the name it was asked for by. tokens: the text of each, of the prompt and then of the
    answer; position i is that of token i. The last one was generated but never fed, so no row can
    hold it. special: the positions of marks. positions: `[layer][KV head]`, sorted; read: those
    that the last decode step read, None of layers that read everything, or where all do.
    """

    model: str
    tokens: list[str]
    special: list[int]
    prompt_tokens: int
    positions: list[list[list[int]]]
    report: Report
    read: list[list[list[int]] | None] | None = None

    @property
    def tokens_seen(self) -> int:
        """Tokens that were fed to the model."""
        return self.report.tokens_seen[0]

    @property
    def slots_kept(self) -> list[list[int]]:
        """Slots of every layer and KV head."""
        return [rows[0] for rows in self.report.slots_kept]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "model": self.model,
            "policy": self.report.policy,
            "prompt_tokens": self.prompt_tokens,
            "tokens_seen": self.tokens_seen,
            "tokens": self.tokens,
            "special": self.special,
            "positions": self.positions,
            "read": self.read,
            "report": self.report.to_dict(),
        }


def look(
    model: Any,
    tokenizer: Any,
    prompt: str,
    policy: str,
    *,
    name: str,
    max_new_tokens: int = 32,
    caps: Mapping[str, Any] | None = None,
) -> Kept:
    """What the policy kept after greedy decoding from the prompt.

    name: of the model, as the page calls it. caps: of tiers. Raises PromptError and the engine's
    errors.
    """
    inputs = tokenize(model, tokenizer, prompt, max_new_tokens)
    with kvpress.attach(model, policy, **(caps or {})) as engine, torch.inference_mode():
        out = engine.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        cache, report = engine.cache, engine.report()
        read = [read_positions(state) for state in cache.states]
    ids = out[0].tolist()
    return Kept(
        model=name,
        tokens=pieces(tokenizer, ids),
        special=special(tokenizer, ids),
        prompt_tokens=inputs["input_ids"].shape[1],
        positions=[
            [cache.kept_positions(layer=kind.index, head=head) for head in range(kind.heads)]
            for kind in cache.fingerprint.kinds
        ],
        report=report,
        read=None if all(rows is None for rows in read) else read,
    )


def tokenize(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> Any:
    """The tokens of a prompt, on the model's device. Raises PromptError."""
    if not prompt:
        raise PromptError("The prompt is empty. Give a prompt of at least one token.")
    inputs = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
    check_positions(model, inputs["input_ids"].shape[1], max_new_tokens)
    return inputs.to(model.device)
