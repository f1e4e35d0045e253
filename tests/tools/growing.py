"""A process of its own in which pools grow chunk by chunk within a plan: JSON of what it held.

`python growing.py keeps` leaves what is freed to the allocator, as it was before.
"""

from __future__ import annotations

import json
import sys

import torch
from helpers import prompt, tiny
from kvpress.bench.speed.peak import Peak

import kvpress
from kvpress.hf.planning import process_bytes, shape_of
from kvpress.hf.support import check_model
from kvpress.pipe.plan.demand import Texts
from kvpress.pipe.plan.passing import RUNTIME, passing_bytes
from kvpress.pipe.state import heap
from kvpress.policy.loading import parse

SHAPE = {"num_hidden_layers": 24, "query_heads": 8, "kv_heads": 8, "head_dim": 64}
TEXTS, CHUNK = Texts(batch=4, length=1032, new=8), 128


def main() -> None:
    if sys.argv[1:] == ["keeps"]:
        heap.trim = lambda: None
    torch.set_num_threads(1)
    peak, ids = Peak(torch.device("cpu")), prompt(TEXTS.batch, TEXTS.prompt)
    model = tiny("llama", hidden_size=512, max_position_embeddings=2048, **SHAPE)
    asked = {"memory": "4GiB", **TEXTS._asdict()}
    asked["new_tokens"] = asked.pop("new")
    with kvpress.attach(model, "full", **asked) as engine:
        generate(engine, prompt(1, 40), None)  # what loads late is there
        base = process_bytes()
        generate(engine, ids, CHUNK)
        held = engine.report().bytes_held
    shape = shape_of(model, check_model(model), 16, None)
    passing = passing_bytes(shape, parse("full"), TEXTS, CHUNK, TEXTS.prompt - CHUNK) - RUNTIME
    found = {"held": held, "beside": peak.bytes() - base - held, "passing": passing}
    print(json.dumps(found))


def generate(engine: kvpress.Engine, ids: torch.Tensor, chunk: int | None) -> None:
    new = {"max_new_tokens": TEXTS.new, "min_new_tokens": TEXTS.new, "do_sample": False}
    engine.generate(ids, **new, pad_token_id=0, prefill_chunk_size=chunk)


if __name__ == "__main__":
    main()
