"""The retrieval head that the policies of an engine ask for, if they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvpress.errors import PolicyError
from kvpress.hf.cache import EngineCache
from kvpress.hf.heads.loading import load_head
from kvpress.hf.support import Fingerprint
from kvpress.pipe.stages import retrieve
from kvpress.pipe.state.ids import ids_of
from kvpress.policy.heads import RetrievalHead
from kvpress.policy.recipe import Recipe


def head_of(recipe: Recipe, model: Any, shape: Fingerprint) -> RetrievalHead | None:
    """What says before the first layer which tokens a step reads; None where nobody asks.

    Raises PolicyError where there is no such head, or it does not fit the model.
    """
    stage = recipe.stage("retrieve")
    rules = {kind: stage.retrieve(kind.index) for kind in shape.kinds if kind.window is None}
    asked = {kind: rule.head for kind, rule in rules.items() if rule and rule.head is not None}
    names = sorted(set(asked.values()))
    if not names:
        return None
    if len(names) > 1:
        raise PolicyError(f"{recipe} asks for the heads {', '.join(names)}: one looks for a model.")
    head = load_head(names[0], model)
    for kind in asked:
        if head.heads not in (kind.heads, kind.of_all):
            raise PolicyError(
                f"head={names[0]} has {head.heads} KV heads, but layer {kind.index} of this model"
                f" has {kind.of_all}. Use a head that was made for this model."
            )
    return head


def look(cache: EngineCache, given: Mapping[str, Any]) -> None:
    """Lets a retrieval head, if there is one, look at the tokens of a pass before its layers do."""
    outlook = cache.context.outlook
    new_BQ = None if outlook is None else ids_of(given)
    if outlook is None or new_BQ is None:
        return
    outlook.look(cache.ids, new_BQ, cache.columns_seen)
    retrieve.foresee(cache.states)
