"""Families of models, divided among processes: those that divide keys, and those that do not.

In fp32, with logits that are far apart; see test_policies.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import ranks
import torch

NEW = 8
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
DIVIDED = ("mistral", "qwen2", "qwen3", "gemma3", "granite", "gpt_neox", "qwen3_5")
REPLICATED = ("phi3", "olmo2", "gpt_oss")
POLICIES = ("keyformer:budget=0.5", "adakv+h2o:budget=0.5")


def saved(family: str, folder: Path) -> Any:
    """A model whose heads four processes can share."""
    fields = {**HEADS, "num_key_value_heads": None} if family == "gpt_neox" else HEADS
    model = helpers.sharp(family, **fields)
    model.save_pretrained(folder / family)
    return model


def outcomes(model: Any, ids: torch.Tensor) -> list[ranks.Outcome]:
    return [ranks.outcome(model, policy, ids, NEW) for policy in POLICIES]


def in_parts(
    rank: int, world: int, folder: Path, families: list[str], ids: torch.Tensor
) -> list[list[ranks.Outcome]]:
    return [outcomes(ranks.divided(folder / family, world), ids) for family in families]


@pytest.mark.parametrize(
    ("world", "families"),
    [(2, [*DIVIDED, *REPLICATED]), (4, ["qwen3", "phi3"])],
    ids=["two", "four"],
)
def test_processes_say_and_keep_what_one_does(
    world: int, families: list[str], tmp_path: Path
) -> None:
    ranks.distributed()
    ids = helpers.prompt(2, 41)
    alone = [outcomes(saved(family, tmp_path), ids) for family in families]
    parts = ranks.together(world, in_parts, tmp_path, families, ids)
    for i, family in enumerate(families):
        for j in range(len(POLICIES)):
            every = [part[i][j] for part in parts]
            ranks.check(alone[i][j], every, replicated=family in REPLICATED)


CAPS = {"device": "400KiB", "host": "8MiB"}


def tiered_in_parts(
    rank: int, world: int, path: Path, ids: torch.Tensor, disk: Path
) -> ranks.Outcome:
    own = disk / str(rank)
    own.mkdir(parents=True)
    options = {**CAPS, "disk": f"8MiB:{own}"}
    return ranks.outcome(ranks.divided(path, world), "full", ids, 4, **options)


def test_pages_go_to_tiers(tmp_path: Path) -> None:
    """Each process has its caps, and a folder of its own."""
    ranks.distributed()
    model, ids, disk = saved("llama", tmp_path), helpers.prompt(1, 900), tmp_path / "disk"
    alone = ranks.outcome(model, "full", ids, 4)
    parts = ranks.together(2, tiered_in_parts, tmp_path / "llama", ids, disk)
    assert [part.tokens for part in parts] == [alone.tokens] * 2
    layers = zip(*(part.positions[0] for part in parts), strict=True)
    assert [[*one, *two] for one, two in layers] == alone.positions[0]


def demo_in_parts(rank: int, world: int, path: str, ids: torch.Tensor) -> ranks.Outcome:
    return ranks.outcome(ranks.divided(Path(path), world), "keyformer:budget=0.3", ids, 12)


def test_a_real_model_in_three_processes(demo: tuple[Any, Any]) -> None:
    """9 query heads and 3 KV heads, in fp32."""
    ranks.distributed()
    model, tokenizer = demo
    text = "A cache keeps the keys and values of the tokens that were read. " * 6
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    path = model.config.name_or_path
    alone = ranks.outcome(model, "keyformer:budget=0.3", ids, 12)
    ranks.check(alone, ranks.together(3, demo_in_parts, path, ids))
