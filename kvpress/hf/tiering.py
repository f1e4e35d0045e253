"""Tiers for the caches of an engine: refused early where they cannot work."""

from __future__ import annotations

from typing import Any

import torch

from kvpress.env import __version__
from kvpress.errors import PolicyError, TierError
from kvpress.hf.support import Fingerprint
from kvpress.pipe.plan.room import Floor, floor
from kvpress.policy.recipe import Recipe
from kvpress.store.tiers.caps import Caps
from kvpress.store.tiers.tiers import Tiers
from kvpress.types import MOST_CODED


def make_tiers(
    model: Any,
    recipe: Recipe,
    shape: Fingerprint,
    caps: Caps | None,
    cache_dtype: torch.dtype | None,
) -> Tiers | None:
    """The tiers of an engine; None without caps.

    Raises PolicyError for policies that write into stored slots, TierError for caps that are too
    small for one sequence and for a folder that cannot be used.
    """
    if caps is None:
        return None
    check_tiers(recipe, shape)
    dtype: torch.dtype = cache_dtype or getattr(model, "dtype", None) or torch.float32
    tiered = [kind for kind in shape.kinds if kind.window is None]
    least = floor(recipe, tiered, dtype)
    _check_device(caps, least)
    _check_lower(caps, least)
    text = getattr(model.config, "text_config", model.config)
    turning = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    return Tiers(caps, f"{__version__} | {shape} | {recipe} | {dtype} | {turning}", least.unit)


def check_tiers(recipe: Recipe, shape: Fingerprint) -> None:
    """Raises TierError, PolicyError where pages of this model or policy can be in no other tier."""
    if all(kind.window is not None for kind in shape.kinds):
        raise TierError(
            "device=, host=, disk=: all layers of this model are sliding-window layers, which keep"
            " their window on the device. Leave the caps out."
        )
    if recipe.merging is not None or recipe.fit is not None or recipe.shares:
        raise PolicyError(
            f"{recipe} changes stored slots, or trims layers later, but pages in other tiers"
            " are never written again. Leave device=, host= and disk= out, or use a policy that"
            " drops."
        )
    if recipe.limits and recipe.limits.budget.unit == "bytes":
        raise PolicyError(
            f"{recipe}: a budget in bytes counts slots as they came, not the whole pages that tiers"
            " hold. Give a fraction or tokens."
        )
    if any(kind.window is None and kind.width > MOST_CODED for kind in shape.kinds):
        raise PolicyError(
            "device=, host=, disk=: keys of this model have more channels than pages of tiers take,"
            f" {MOST_CODED}. Leave the caps out."
        )
    if any(kind.readers for kind in shape.kinds):
        raise PolicyError(
            "device=, host=, disk=: layers of this model share their keys and values, of which"
            " those that read them need all on the device. Leave the caps out."
        )
    if any(kind.slopes for kind in shape.kinds):
        raise PolicyError(
            "device=, host=, disk=: keys of this model carry ALiBi positions in channels, which"
            " stay on the device. Leave the caps out."
        )


def _check_device(caps: Caps, least: Floor) -> None:
    """Raises TierError where open spans of every layer do not fit beside what is on its way."""
    if caps.device < least.on_way + least.opened():
        raise TierError(
            f"device={caps.device} bytes are too few: {least.on_way} are for pages on their way,"
            f" and one sequence has recent slots and an open span of up to {max(least.spans)} bytes"
            f" in each of {len(least.spans)} layers. Give at least"
            f" device={least.on_way + least.opened()}, and {2 * sum(least.spans)} more for every"
            " further sequence."
        )


def _check_lower(caps: Caps, least: Floor) -> None:
    """Raises TierError where the host, or what leads to the disk, has no room for a record."""
    lacking = least.lacks(caps.host, caps.disk.bytes if caps.disk else 0)
    if lacking:
        raise TierError(f"{lacking}.")
