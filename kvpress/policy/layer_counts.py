"""Options that count layers, held against the layers that a model has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvpress.errors import PolicyError
from kvpress.policy.base import Policy
from kvpress.policy.layer_shares import Division
from kvpress.policy.recipe import Recipe
from kvpress.types import LayerKind


def check_layers(recipe: Recipe, kinds: Sequence[LayerKind]) -> None:
    """Raises PolicyError where a policy counts more layers than there are, or spares them all.

    Who spares every layer would change nothing, and nobody would see that.
    """
    for policy in recipe.policies:
        for name, number in _counts(policy).items():
            # What nobody asked for may be more than a small model has, as long as some are left.
            if number > len(kinds) and number != getattr(type(policy), name):
                raise PolicyError(
                    f"{name}={number} of policy {policy.name!r}: this model has {len(kinds)}"
                    f" layers. Give a number below {len(kinds)}."
                )
    whole = [kind.index for kind in kinds if kind.window is None]
    reader, sharer = recipe.stage("retrieve"), recipe.stage("share")
    if whole and recipe.retrieves and all(reader.retrieve(index) is None for index in whole):
        raise _spares_all(reader, "read everything", whole)
    division = Division.of(sharer)
    if whole and recipe.shares and division.full_first + division.full_last >= len(whole):
        raise _spares_all(sharer, "keep everything", whole)


def _counts(policy: Policy) -> dict[str, int]:
    """The options of a policy that count layers, as they are set."""
    counting = [f.name for f in dataclasses.fields(policy) if f.metadata.get("layers")]
    return {name: getattr(policy, name) for name in counting if getattr(policy, name) is not None}


def _spares_all(policy: Policy, do: str, whole: Sequence[int]) -> PolicyError:
    given = ", ".join(f"{name}={number}" for name, number in _counts(policy).items())
    return PolicyError(
        f"{policy.name}:{given or policy}: all {len(whole)} layers of this model that keep every"
        f" token, numbers {whole[0]} to {whole[-1]}, would {do}, and the policy would do nothing."
        " Give smaller numbers."
    )
