"""The memory of a process of its own that reads prompts and decodes under caps."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from kvpress.bench.common.candidates import candidate, warm_up, weight_bytes
from kvpress.bench.common.caps import cache_bytes
from kvpress.bench.common.journal import Row
from kvpress.bench.common.models import Source
from kvpress.bench.common.processes import in_a_process
from kvpress.bench.common.prompt import prompts
from kvpress.bench.speed.peak import Peak
from kvpress.bench.tiers.setting import Setting

_SAMPLES = 20  # of what is resident, over the decoded tokens


def measure(setting: Setting) -> Row:
    """Bytes before the first prompt, at most while it is read, and at most while tokens come.

    caps: of the device and the host together. resident: over the decoded tokens, evenly spread.
    """
    job = {"setting": {**vars(setting), "source": vars(setting.source)}}
    return in_a_process(__name__, job)


def main() -> None:
    """One job from standard input; its row is the last line of standard output."""
    given = json.loads(sys.stdin.read())["setting"]
    setting = Setting(**{**given, "source": Source(**given["source"])})
    torch.set_num_threads(setting.threads)
    model, tokenizer = setting.source.load()
    with torch.inference_mode():
        row = peaks(setting, model, tokenizer)
    sys.stdout.write("\n" + json.dumps({**row, "error": None}))


def peaks(setting: Setting, model: Any, tokenizer: Any) -> Row:
    """The row of this process."""
    steps = setting.memory_steps
    ids_BQ = prompts(model, tokenizer, setting.tokens, setting.batch, steps)
    caps = setting.sizes(cache_bytes(model, setting.tokens + steps, setting.batch))
    made = candidate(model, setting.policies[0], None, steps, caps)
    warm_up(made.model)
    peak = Peak(ids_BQ.device)
    before, cache = peak.now(), made.new_cache()
    token_B1 = made.forward(ids_BQ, cache)[:, -1].argmax(-1, keepdim=True)
    reading = peak.bytes()
    peak.reset()
    resident = [peak.now()]
    for number in range(1, steps + 1):
        token_B1 = made.forward(token_B1, cache)[:, -1].argmax(-1, keepdim=True)
        if number % max(1, steps // _SAMPLES) == 0:
            resident.append(peak.now())
    tiers = cache.report().tiers
    made.tiers.close()
    return {
        "bytes_before": before,
        "bytes_weights": weight_bytes(model),
        "bytes_peak_prefill": reading,
        "bytes_peak_decode": peak.bytes(),
        "caps": tiers.caps["device"] + tiers.caps["host"],
        "resident": resident,
        "steps": steps,
    }


if __name__ == "__main__":
    main()
