"""Recipes: policies combined, at most one for each stage."""

from __future__ import annotations

import dataclasses
import functools

from kvpress.errors import PolicyError
from kvpress.formulas.merging import Merging
from kvpress.policy.base import Policy, stages_of
from kvpress.policy.budget import Limits
from kvpress.policy.formats import Packing
from kvpress.policy.pooling import Pool
from kvpress.policy.refit import Refit
from kvpress.policy.slots import Need
from kvpress.policy.sparsity import Sparsity
from kvpress.policy.stages import STAGES
from kvpress.types import Rank


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Policies combined with `+`: at most one for each stage."""

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        owners = self._owners
        for stage in STAGES:
            if stage.name in owners and not owners.keys().isdisjoint(stage.not_beside):
                raise PolicyError(f"{self} {stage.why}.")
        ranked = self.stage("score").rank
        if ranked in ("mass", "mass_per_age") and not self.accumulates:
            raise PolicyError(
                f"{self} ranks by {ranked!r} but keeps no mass. Set `accumulates = True`, or rank"
                " by 'position'."
            )
        if "share" in owners and (ranked is None or self.stage("select").overrides("select")):
            raise PolicyError(
                f"{self} divides the budget among the layers once a prompt has passed all,"
                " which needs a ranking by what is stored with the slots. Combine it with a policy"
                " that has a `rank`."
            )
        if self.limits and "score" not in owners and "select" not in owners:
            raise PolicyError(
                f"{self} has a budget but neither scores nor selects. Combine it with a policy that"
                " does."
            )
        divider = owners.get("allocate") or owners.get("compete")
        if divider and not self.limits:
            raise PolicyError(
                f"{self}: {divider.name!r} divides a budget among rows, but there is none. Combine"
                " it with a policy that has one."
            )
        if self.formats and self.limits and self.limits.budget.unit == "bytes":
            raise PolicyError(
                f"{self}: a budget in bytes counts slots as they came, not packed ones. Give a"
                " fraction or tokens."
            )
        if self.pool is not None and self.limits:
            self.pool.check_beside(self.limits)
        if self.packing is not None:
            prunes = self.stage("prune").overrides("prune")
            self.packing.check_beside(prunes, self.retrieves, str(self))
        if self.fit is not None:
            self.fit.check_beside(self.limits, self.formats, str(self))

    @functools.cached_property
    def _owners(self) -> dict[str, Policy]:
        """Who replaces which stage, looked up several times per layer and decoded token.

        Raises PolicyError where two replace the same one.
        """
        owners: dict[str, Policy] = {}
        for policy in self.policies:
            parts = stages_of(policy) | ({"budget"} if policy.limits else set())
            for part in sorted(parts):
                if part in owners:
                    raise PolicyError(
                        f"{owners[part].name!r} and {policy.name!r} both replace the stage"
                        f" {part!r}. Policies combined with '+' must replace different stages: drop"
                        " one of the two."
                    )
                owners[part] = policy
        return owners

    def stage(self, name: str) -> Policy:
        """The policy that answers this stage: the one that replaces it, or the default."""
        return self._owners.get(name, _DEFAULT)

    @property
    def limits(self) -> Limits | None:
        """The budget of the combination, if one of its policies has one."""
        return next((p.limits for p in self.policies if p.limits), None)

    @functools.cached_property
    def accumulates(self) -> bool:
        """Whether a per-slot mass is kept in the store."""
        return any(p.accumulates for p in self.policies)

    @functools.cached_property
    def gathers(self) -> bool:
        """Whether the mass is renewed with every chunk and step."""
        return self.gathers_prompts and all(p.accumulates_steps for p in self.policies)

    @functools.cached_property
    def gathers_prompts(self) -> bool:
        """Whether the mass is renewed with every chunk of a prompt, and not by probes alone."""
        return self.accumulates and not self.probes

    @functools.cached_property
    def shares(self) -> bool:
        """Whether layers get budgets of their own once a prompt has passed all of them."""
        return self.stage("share").overrides("share")

    @functools.cached_property
    def allocates(self) -> bool:
        """Whether rows get budgets of their own, given with every prompt."""
        return self.stage("allocate").overrides("allocate")

    @functools.cached_property
    def pool(self) -> Pool | None:
        """How rows compete for the budget by their scores, if they do."""
        return self.stage("compete").compete()

    @functools.cached_property
    def uneven(self) -> bool:
        """Whether rows may have other budgets than their neighbours."""
        return self.shares or self.allocates or self.pool is not None

    @functools.cached_property
    def probes(self) -> bool:
        """Whether a prompt is looked at a second time."""
        return self.stage("probes").overrides("probes")

    @functools.cached_property
    def defers(self) -> bool:
        """Whether a prompt is held whole until it has passed all layers, and only then scored."""
        return self.looks or (self.pool is not None and self.pool.scope == "model")

    @functools.cached_property
    def looks(self) -> bool:
        """Whether something is read behind a prompt: to score its slots, or to fit them."""
        return self.probes or self.fit is not None

    @functools.cached_property
    def fit(self) -> Refit | None:
        """By which rule the slots that stay are fitted, if they are."""
        rule = self.stage("refit").absorb()
        return rule if isinstance(rule, Refit) else None

    @functools.cached_property
    def needs(self) -> frozenset[Need]:
        """What scores and selections must be shown besides the slots."""
        return self.stage("score").needs | self.stage("select").needs

    @functools.cached_property
    def merging(self) -> Merging | None:
        """By which rule evicted slots are merged into kept ones, if they are."""
        rule = self.stage("absorb").absorb()
        return rule if isinstance(rule, Merging) else None

    @functools.cached_property
    def sparsity(self) -> Sparsity | None:
        """Which blocks of a prompt's attention are computed, where not all of them are."""
        return self.stage("sparsify").sparsify()

    @functools.cached_property
    def retrieves(self) -> bool:
        """Whether a decode step reads some of the stored pages only."""
        return self.stage("retrieve").overrides("retrieve")

    @functools.cached_property
    def formats(self) -> bool:
        """Whether old slots keep fewer channels or bits."""
        return self.stage("prune").overrides("prune") or self.packing is not None

    @functools.cached_property
    def packing(self) -> Packing | None:
        """The bits of old slots, if they are quantised."""
        return self.stage("pack").pack()

    @property
    def residual(self) -> int:
        """Last tokens that stay as they came."""
        return max(self.stage("prune").residual, self.stage("pack").residual)

    @functools.cached_property
    def watched(self) -> int:
        """Last queries that decide how old slots are stored."""
        packing = self.packing
        asks = packing is not None and (packing.bound is not None or packing.boost > 0)
        return max(self.stage("prune").watched, packing.window if packing and asks else 0)

    @functools.cached_property
    def rank(self) -> Rank | None:
        """What ranks the slots, where that and the usual selection are all there is to it."""
        scorer, selector = self.stage("score"), self.stage("select")
        if scorer.overrides("score") or selector.overrides("select"):
            return None
        return scorer.rank

    def __str__(self) -> str:
        return "+".join(str(p) for p in self.policies)


_DEFAULT = Policy()


def needs_rotation(recipe: Recipe) -> bool:
    """Whether some stage must know how keys turn with their positions."""
    turns = recipe.merging is not None and recipe.merging.keys == "unrotated"
    return turns or any("rotation" in recipe.stage(name).needs for name in ("prune", "score"))


def recalled(recipe: Recipe) -> int:
    """Last queries that scores are shown while decoding."""
    scorer = recipe.stage("score")
    evicts = recipe.limits is not None and recipe.limits.interval > 0
    return scorer.watched if evicts and scorer.overrides("score") else 0


def adds_attention(recipe: Recipe) -> bool:
    """Whether the mass is the plain sum of the observed attention, which kernels can keep."""
    return recipe.gathers and not recipe.stage("accumulate").overrides("accumulate")


class Newest(Policy):
    """What a sliding-window layer keeps."""

    @property
    def rank(self) -> Rank:
        """Later is better."""
        return "position"
