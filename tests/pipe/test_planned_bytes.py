"""A plan's bytes are those of the ledger: what is foreseen without a slot is what is then held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import prompt, tiny

import kvpress
from kvpress.hf.planning import shape_of
from kvpress.pipe.plan.demand import Texts
from kvpress.pipe.plan.held import Bytes, cache_bytes
from kvpress.policy.loading import parse

PROMPT, NEW, BATCH = 700, 40, 2
CAPS = {"device": "3MiB", "host": "30MiB"}
EVICTING = "snapkv:budget=256"
CASES: list[tuple[str, int | None, dict[str, Any]]] = [
    ("full", None, {}),
    ("full", 128, {}),
    ("quant:key_bits=8,value_bits=8", None, {}),
    ("quant:guard=none", 128, {}),
    (EVICTING, None, {}),
    (EVICTING, 128, {}),
    ("h2o:budget=0.5", None, {}),
    (f"{EVICTING}+quant:guard=none", None, {}),
    ("quest:read=128", None, {}),
    ("full", 128, CAPS),
    ("quant:guard=none", None, CAPS),
    ("quest:read=128", None, CAPS),
    (EVICTING, None, CAPS),
    ("r_kv:budget=64,recent=32,interval=8", None, {}),
    ("quant:key_bits=2,boost=0.25,guard=none", 128, {}),
]


def both(
    spec: str, chunk: int | None, caps: dict[str, Any], family: str = "llama"
) -> tuple[int, Bytes]:
    """Bytes of the ledger and of the plan."""
    model = tiny(family, max_position_embeddings=4096)
    with kvpress.attach(model, spec, **caps) as engine:
        engine.generate(
            prompt(BATCH, PROMPT),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            prefill_chunk_size=chunk,
        )
        held, found = engine.report().bytes_held, engine.spec.fingerprint
    # The last token is chosen, but not fed any more.
    texts = Texts(BATCH, PROMPT + NEW - 1, NEW - 1)
    shape = shape_of(model, found, 16, None)
    return held, cache_bytes(shape, parse(spec), texts, chunk or PROMPT, bool(caps))


@pytest.mark.parametrize(
    ("spec", "chunk", "caps"), CASES, ids=lambda x: "tiers" if x else str(x or "-")
)
def test_plan_and_ledger_agree(spec: str, chunk: int | None, caps: dict[str, Any]) -> None:
    held, planned = both(spec, chunk, caps)
    assert abs(planned.held - held) <= 0.02 * held


def test_sliding_layers_are_planned_with_their_window() -> None:
    held, planned = both("full", None, {}, "gemma3")
    assert abs(planned.held - held) <= 0.02 * held


@pytest.mark.parametrize("spec", ["quant", f"{EVICTING}+quant:guard=none", "think"])
def test_what_cannot_be_foreseen_is_planned_at_its_most(spec: str) -> None:
    """Rows that a guard keeps wide, holes of what is evicted from packed pages, channels."""
    held, planned = both(spec, 128, {})
    assert held <= planned.held + planned.waiting


def test_stored_dtype_halves_what_is_held() -> None:
    model = tiny("llama")
    found = kvpress.hf.support.check_model(model)
    wide, narrow = (shape_of(model, found, 16, x) for x in (torch.float32, torch.bfloat16))
    texts = Texts(1, 4000, 16)
    full = [cache_bytes(shape, parse("full"), texts, 4000).held for shape in (wide, narrow)]
    assert full[1] < 0.55 * full[0]
