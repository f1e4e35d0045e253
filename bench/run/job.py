"""The main job: prompts through one policy, streamed, timed and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from kvpress.bench.common.prompt import PromptError, check_positions
from kvpress.bench.run.session import Session
from rich.table import Table
from rich.text import Text
from transformers import BatchEncoding

import kvpress
from kvpress.report import Report
from kvpress.report.tables import new_table, size, span

BASELINE = "full"  # the policy that everything is compared with


@dataclass(frozen=True)
class Result:
    """What one policy did with the prompts.

    Seconds are wall-clock; the first token includes the whole prompt.
    """

    policy: str
    texts: list[str]
    prompt_tokens: list[int]
    new_tokens: int  # decoded per sequence, the longest
    first_token_seconds: float
    tokens_per_second: float | None  # over all sequences, after the first token; None for one token
    report: Report
    resumed_tokens: int | None = None  # of a session, which were not read again
    text: dict[str, str] | None = None  # that prompts were made of: its name and hash

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"report": self.report.to_dict()}


class Stopwatch:
    """A streamer for `generate` that times every token and passes text on once it is whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None) -> None:
        self.times: list[float] = []
        self._tokenizer, self._on_text = tokenizer, on_text
        self._tokens: list[int] = []
        self._shown = 0
        self._prompt_seen = False

    def put(self, tokens: torch.Tensor) -> None:
        """Takes the prompt once, then the next token of every sequence."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if self._on_text is not None:
            self._tokens.append(int(tokens.flatten()[0]))
            self._show(final=False)

    def end(self) -> None:
        """Shows what was held back."""
        if self._on_text is not None:
            self._show(final=True)

    def _show(self, final: bool) -> None:
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not final and text.endswith("�"):  # half of a character: wait for the rest
            return
        if text[self._shown :] and self._on_text is not None:
            self._on_text(text[self._shown :])
            self._shown = len(text)


def run(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    policy: str,
    *,
    max_new_tokens: int = 64,
    page_size: int = 16,
    on_text: Callable[[str], None] | None = None,
    caps: Mapping[str, Any] | None = None,
    session: Session | None = None,
    **generation: Any,
) -> Result:
    """Generates from the prompts, one left-padded batch, with a policy.

    Raises PromptError and the engine's errors. on_text is called with pieces of the first
    text as they come; caps of tiers go to `attach`, generation goes to `model.generate`. session:
    goes on from what it holds, with one prompt that is no chat yet, and is saved afterwards.
    """
    if not prompts or not all(prompts):
        raise PromptError(
            "There is no prompt, or one is empty. Give at least one prompt of at least one token."
        )
    if max_new_tokens < 1:
        raise PromptError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    watch = Stopwatch(tokenizer, on_text)
    with (
        kvpress.attach(model, policy, page_size=page_size, **(caps or {})) as engine,
        closing(engine.spec.tiers) if engine.spec.tiers else nullcontext(),
        torch.inference_mode(),
    ):
        start, cache = time.perf_counter(), session.resume(engine) if session else None
        resumed = None if cache is None else cache.get_seq_length()
        inputs = _inputs(tokenizer, prompts, session, cache).to(model.device)
        width = inputs["input_ids"].shape[1]
        check_positions(model, width, max_new_tokens)
        given = {"max_new_tokens": max_new_tokens, "streamer": watch, **generation}
        out = engine.generate(**inputs, cache=cache, **given)
        if session is not None:
            session.save(engine, engine.cache, out)
        report = engine.report()
    decoded = len(watch.times) - 1
    seconds = watch.times[-1] - watch.times[0]
    return Result(
        policy=policy,
        texts=tokenizer.batch_decode(out[:, width:], skip_special_tokens=True),
        prompt_tokens=inputs["attention_mask"].sum(1).tolist(),
        new_tokens=len(watch.times),
        first_token_seconds=watch.times[0] - start,
        tokens_per_second=decoded * len(prompts) / seconds if decoded else None,
        report=report,
        resumed_tokens=resumed,
    )


def table(results: Sequence[Result]) -> Table:
    """One line per policy: tokens seen, slots kept, bytes, time to first token, speed."""
    sparse = [f"{r.policy} ({r.report.density:.0%} of it)" for r in results if r.report.density < 1]
    exact = "Prompt attention is exact; only what is stored is compressed."
    title = f"Prompt attention is exact but for {', '.join(sparse)}." if sparse else exact
    made = new_table(
        ["policy"], ("seen", "kept", "full", "held", "share", "TTFT s", "tok/s"), title
    )
    for result in results:
        report = result.report
        parts = report.ranks or [report.own_bytes]
        held, full = (sum(x) for x in zip(*((x.held, x.full) for x in parts), strict=True))
        rows = [slots for layer in report.slots_kept for heads in layer for slots in heads]
        speed = result.tokens_per_second
        made.add_row(
            Text(result.policy),
            span(report.tokens_seen),
            span(rows),
            size(full),
            size(held),
            f"{held / full if full else 1.0:.1%}",
            f"{result.first_token_seconds:.2f}",
            "–" if speed is None else f"{speed:.2f}",
        )
    return made


def _inputs(tokenizer: Any, prompts: Sequence[str], session: Session | None, cache: Any) -> Any:
    """What `generate` takes: the prompts, or all that a session has seen and the next turn."""
    if session is None:
        return _tokenize(tokenizer, prompts)
    ids = session.ids(tokenizer, prompts[0], cache)
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _tokenize(tokenizer: Any, prompts: Sequence[str]) -> Any:
    if len(prompts) == 1:
        return tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False)
    if tokenizer.pad_token_id is None:
        # Padding is masked: any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer(
        list(prompts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )
