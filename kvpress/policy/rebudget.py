"""The same recipe with another budget."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvpress.errors import BudgetError
from kvpress.policy.base import Policy
from kvpress.policy.budget import Budget
from kvpress.policy.recipe import Recipe


def with_budget(recipe: Recipe, budget: Budget | str | int | float) -> Recipe:
    """A recipe whose budget is another one.

    Raises BudgetError where the recipe has none, or for one that cannot be read or met, PolicyError
    where other options of the policy do not go with it.
    """
    wanted = Budget.parse(budget)
    owners = [policy for policy in recipe.policies if policy.limits is not None]
    if not owners or not hasattr(owners[0], "budget"):
        raise BudgetError(f"budget={budget}: {recipe} has no budget. Leave it out.")
    policies = (
        _replaced(policy, wanted) if policy is owners[0] else policy for policy in recipe.policies
    )
    return Recipe(tuple(policies))


def _replaced(policy: Any, budget: Budget) -> Policy:
    replaced: Policy = dataclasses.replace(policy, budget=budget)
    return replaced
