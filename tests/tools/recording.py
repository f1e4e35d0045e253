"""What a run of every policy gave when it was recorded: tokens, bytes and kept positions.

    python tests/tools/recording.py            records anew what tests/data/recording.json holds

The weights are whole numbers over a power of two, so that every machine has the same ones. A policy
whose scores are so near to each other here that rounding decides cannot be among them: knorm.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import torch

import kvpress

FILE = Path(__file__).parents[1] / "data" / "recording.json"
RECIPES = (
    "full",
    "keyformer:budget=0.5",
    "d2o:budget=0.4prompt",
    "h2o:budget=24+quant:residual=8",
    "snapkv:budget=0.4prompt,window=8+think:recent=8,window=8",
    "sale:threshold=0.02,least=32,local=16+streaming_llm:budget=30",
    "h2o:budget=0.5,sink=2",
    "random:budget=0.5",
    "tova:budget=0.5prompt",
    "keyformer:budget=24,noise=frozen,interval=4",
    "think+quant",
)
LENGTHS, DRAFT, NEW = [90, 71], 3, 24


def model() -> Any:
    """Three layers of grouped-query attention, the same on every machine."""
    made = helpers.tiny("llama", num_hidden_layers=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(made.named_parameters()):
            if weight.dim() > 1:
                whole = torch.randint(-128, 129, weight.shape, generator=generator)
                weight.copy_(whole / (256 if "embed" in name or "lm_head" in name else 512))
    return made


def record(made: Any, recipe: str) -> dict[str, Any]:
    """A padded batch: a prompt, decoded tokens, a fork, beams, a second turn."""
    ids, mask = helpers.padded(LENGTHS, "left")
    engine = kvpress.attach(made, recipe)
    try:
        cache = engine.new_cache(max_new_tokens=NEW)
        tokens = helpers.greedy(made, ids, mask, NEW, cache)
        first = state(cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        turn, seen = tokens[[1, 0], :7], torch.ones(2, NEW - 1 + 7, dtype=torch.long)
        width = torch.cat([mask[[1, 0]], seen], dim=1)
        position = (width.cumsum(1) - 1).clamp_min(0)[:, -7:]
        with torch.no_grad():
            logits = made(
                turn, attention_mask=width, position_ids=position, past_key_values=cache
            ).logits
        return {
            "tokens": tokens.tolist(),
            "next": logits[:, -1].argmax(-1).tolist(),
            "first": first,
            "last": state(cache),
        }
    finally:
        kvpress.detach(made)


def state(cache: Any) -> dict[str, Any]:
    """Bytes of the ledger, and a row of kept positions per sequence, layer and head as text."""
    report = cache.report()
    rows = [
        " ".join(str(p) for p in cache.kept_positions(layer, sequence, head))
        for sequence in range(len(LENGTHS))
        for layer, kind in enumerate(cache.fingerprint.kinds)
        for head in range(kind.heads)
    ]
    names = ("bytes_held", "bytes_full", "bytes_shared", "bytes_ids", "bytes_peak")
    return {"rows": rows, **{name: getattr(report, name) for name in names}}


def main() -> None:
    made = model()
    FILE.parent.mkdir(exist_ok=True)
    found = {recipe: record(made, recipe) for recipe in RECIPES}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
