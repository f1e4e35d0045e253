"""Caches of tiny models in tiers, and what is looked at of their sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import torch

import kvpress

# A page of every kind: evicting or not, packed or as it came, masses and positions beside it.
RECIPES = [
    "full",
    "snapkv:budget=0.5,window=8",
    "quant:residual=8",
    "keyformer:budget=0.5+quant:residual=8",
]
TIERS = ["device", "host", "disk", "host and disk"]
STEPS = helpers.prompt(2, 8, seed=3).split(1, dim=1)


def caps(which: str, folder: Path, device: str = "600KiB") -> dict[str, str]:
    """Options of `attach`: what does not fit on the device goes to the tiers named."""
    if which == "device":
        return {"device": "4MiB"}
    folder.mkdir(exist_ok=True)
    given = {"device": device}
    if "host" in which:
        given["host"] = "512KiB" if "disk" in which else "4MiB"
    if "disk" in which:
        given["disk"] = f"16MiB:{folder}"
    return given


def attached(recipe: str, given: dict[str, str], **fields: Any) -> Any:
    model = helpers.tiny(**({"num_hidden_layers": 2} | fields))
    return kvpress.attach(model, recipe, **given)


@torch.no_grad()
def filled(engine: Any, tokens: int = 600, batch: int = 2) -> Any:
    """A cache with so many tokens, read in pieces that fit on the device."""
    cache = engine.new_cache(max_new_tokens=20)
    for part in helpers.prompt(batch, tokens).split(80, dim=1):
        engine.model(part, past_key_values=cache)
    return cache


@torch.no_grad()
def goes_on(engine: Any, cache: Any, steps: Any = STEPS) -> list[torch.Tensor]:
    return [engine.model(step, past_key_values=cache).logits for step in steps]


def same(given: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(given) == len(expected) and all(map(torch.equal, given, expected))


def data_file(path: Path) -> Path:
    """The data file of a session; there is one."""
    (found,) = path.parent.glob(f"{path.name}.*.pages")
    return found


def tier_bytes(cache: Any) -> dict[str, int]:
    found = [state.store.memory.tier_bytes() for state in cache.states]
    return {tier: sum(x[tier] for x in found) for tier in found[0]}


def check(engine: Any, cache: Any) -> None:
    """Raises unless everything that is known of pages and records agrees."""
    assert cache.check_integrity()
    if engine.spec.tiers.vault is not None:
        engine.spec.tiers.vault.check_integrity()
