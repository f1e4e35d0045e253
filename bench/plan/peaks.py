"""The most bytes of a process of its own that attaches with `memory=` and reads what was planned.

The allocator is left as a user has it: what it keeps of freed blocks counts.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from kvpress.bench.common.journal import Row
from kvpress.bench.common.models import Source
from kvpress.bench.common.processes import in_a_process
from kvpress.bench.common.prompt import prompts
from kvpress.bench.speed.peak import Peak

import kvpress

_TEXT = 4000  # tokens of a prompt, of which longer ones are made


def measure(source: Source, asked: dict[str, Any], threads: int) -> Row:
    """The row of a job. asked: what `attach` takes."""
    job = {"source": vars(source), "asked": asked, "threads": threads}
    return in_a_process(__name__, job, frees=False)


def main() -> None:
    """One job from standard input; its row is the last line of standard output."""
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(job["threads"])
    peak = Peak(torch.device("cpu"))
    model, tokenizer = Source(**job["source"]).load()
    try:
        row = peaks(model, tokenizer, job["asked"], peak if model.device.type == "cpu" else None)
    except kvpress.PlanError as error:  # which is what is to happen where nothing fits
        row = {"refused": str(error)}
    sys.stdout.write("\n" + json.dumps({**row, "error": None}))


def peaks(model: Any, tokenizer: Any, asked: dict[str, Any], peak: Peak | None) -> Row:
    """What was planned, and the most that was held. peak: since the process began; None: a GPU."""
    peak = peak or Peak(model.device)
    tokens, new = asked["length"] - asked["new_tokens"], asked["new_tokens"]
    ids_BT = _prompts(model, tokenizer, tokens, asked["batch"])
    with kvpress.attach(model, **asked) as engine:
        engine.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        plan, held = engine.plan, engine.report().bytes_held
    assert plan is not None, "there was a memory"
    return {"plan": plan.to_dict(), "bytes_held": held, "bytes_peak": peak.bytes()}


def _prompts(model: Any, tokenizer: Any, tokens: int, batch: int) -> torch.Tensor:
    """Unequal prompts, which share no pages; longer ones than the model knows repeat themselves."""
    part_BT = prompts(model, tokenizer, min(tokens, _TEXT), batch, 0)
    ids_BT = part_BT.repeat(1, -(-tokens // part_BT.shape[1]))[:, :tokens]
    return torch.stack([row_T.roll(number) for number, row_T in enumerate(ids_BT)])


if __name__ == "__main__":
    main()
