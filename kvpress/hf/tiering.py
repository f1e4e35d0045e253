"""Tiers for the caches of an engine: refused early where they cannot work."""

from __future__ import annotations

from typing import Any

import torch

from kvpress.env import __version__
from kvpress.errors import PolicyError, TierError
from kvpress.hf.support import Fingerprint
from kvpress.pipe.state.stores import Stores
from kvpress.policy.recipe import Recipe
from kvpress.store.spans import span_pages
from kvpress.store.tiers.caps import Caps
from kvpress.store.tiers.tiers import Tiers
from kvpress.store.units import unit_bytes
from kvpress.types import LayerKind


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
    _check(recipe, shape)
    dtype: torch.dtype = cache_dtype or getattr(model, "dtype", None) or torch.float32
    tiered = [kind for kind in shape.kinds if kind.window is None]
    unit = _check_device(caps, recipe, tiered, dtype)
    text = getattr(model.config, "text_config", model.config)
    turning = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    return Tiers(caps, f"{__version__} | {shape} | {recipe} | {dtype} | {turning}", unit)


def _check(recipe: Recipe, shape: Fingerprint) -> None:
    if all(kind.window is not None for kind in shape.kinds):
        raise TierError(
            "device=, host=, disk=: all layers of this model are sliding-window layers, which keep"
            " their window on the device. Leave the caps out."
        )
    if recipe.merging is not None or recipe.shares:
        raise PolicyError(
            f"{recipe} merges into stored slots, or trims layers later, but pages in other tiers"
            " are never written again. Leave device=, host= and disk= out, or use a policy that"
            " drops."
        )
    if recipe.limits and recipe.limits.budget.unit == "bytes":
        raise PolicyError(
            f"{recipe}: a budget in bytes counts slots as they came, not the whole pages that tiers"
            " hold. Give a fraction or tokens."
        )
    if any(kind.slopes for kind in shape.kinds):
        raise PolicyError(
            "device=, host=, disk=: keys of this model carry ALiBi positions in channels, which"
            " stay on the device. Leave the caps out."
        )


def _check_device(caps: Caps, recipe: Recipe, kinds: list[LayerKind], dtype: torch.dtype) -> int:
    """Raises TierError where open spans of every layer do not fit beside what is on its way.

    Those of a prompt may be two: one that is complete goes down only once the next one has begun.
    Returns the most bytes that any layer reads at once.
    """
    units, spans = [], []
    for kind in kinds:
        rule = recipe.stage("retrieve").retrieve(kind.index)
        stores = Stores(recipe, recipe.limits, 0, dtype, kind.index, retrieval=rule)
        widths = (kind.width or 1, kind.width or 1)  # values as wide as keys
        layouts = stores.layouts(widths, widths, dtype.itemsize)
        units.append(unit_bytes(kind.heads, layouts))
        spans.append(kind.heads * max(span_pages(x) * x.page_bytes for x in layouts))
    on_way, opened = 2 * max(units), 2 * sum(spans) + max(spans)
    if caps.device < on_way + opened:
        raise TierError(
            f"device={caps.device} bytes are too few: {on_way} are for pages on their way, and one"
            f" sequence has recent slots and an open span of up to {max(spans)} bytes in each of"
            f" {len(spans)} layers. Give at least device={on_way + opened}, and {2 * sum(spans)}"
            " more for every further sequence."
        )
    return max(units)
