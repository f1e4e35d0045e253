"""Policies: recipes that replace stages of the pipe, their options, and how they combine.

A policy is one file with one frozen dataclass derived from `Policy`: fields made with `option()`
are its hyper-parameters, methods that it overrides are the stages that it replaces. Policies are
stateless and shared freely; what belongs to a sequence lives with its slots in the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.formulas.merging import Merging
from kvpress.formulas.ranking import keep_top, ranking
from kvpress.formulas.sums import Observation
from kvpress.policy.budget import Limits
from kvpress.policy.formats import Channels, Packing, Window
from kvpress.policy.layer_shares import Division
from kvpress.policy.options import as_text, coerce, option_types
from kvpress.policy.pooling import Calibrated, Pool, Room
from kvpress.policy.probes import Probe, Text
from kvpress.policy.refit import Refit
from kvpress.policy.retrieval import Retrieval
from kvpress.policy.slots import Need, Slots, Step
from kvpress.policy.sparsity import Sparsity
from kvpress.policy.stages import STAGES
from kvpress.types import Rank

_FAR = 2**31  # a layer behind any of which the first ones are another matter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies. A subclass overrides the methods of the stages that it replaces.

    Common options, read by the engine where a policy declares them: `budget`, `sink`, `recent`
    (tokens), `recent_ratio` (share of the budget), `interval` (decoded tokens between evictions; 0:
    prompts only); for policies with `share`, the fields of `Division`.
    """

    # True: a mass stays with the slots; `accumulate` renews it with every chunk and decode step.
    accumulates: ClassVar[bool] = False
    # False: with prompts alone; slots that came while decoding have the mass 0 until the next one.
    accumulates_steps: ClassVar[bool] = True
    # True: what is known of a row depends on other rows; see `Slots.of_all_heads`.
    joins_heads: ClassVar[bool] = False
    # Value of the option `mode` -> options that are not given (none) and what they then are.
    modes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        hints = option_types(type(self))
        for name, value in self.modes.get(getattr(self, "mode", ""), {}).items():
            if str(getattr(self, name)).lower() == "none":
                object.__setattr__(self, name, value)
        for field in dataclasses.fields(self):
            value = coerce(type(self), field, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        pool, limits = self.compete(), self.limits
        if pool is not None:
            pool.check()
        fit = self.absorb()
        if isinstance(fit, Refit):
            fit.check()
        for retrieval in (self.retrieve(0), self.retrieve(_FAR)):
            if retrieval is not None:
                retrieval.check()
        if limits is not None:
            limits.check()
            if limits.budget.unit == "bytes" and max(Division.of(self)[2:]) > 0:
                raise PolicyError(
                    f"budget={limits.budget}: layers that are never compressed grow beyond any"
                    " bytes. Give a fraction or tokens, or full_first=0,full_last=0."
                )

    def sparsify(self) -> Sparsity | None:
        """Which blocks of a prompt's attention are computed. Default: all of them."""
        return None

    def allocate(self, room: Room) -> Sequence[Sequence[float]] | Tensor:
        """Slots of every row that has the budget: a list for each layer, a number for each KV head.

        Rows may get more and others less: the sum is `room.slots` for each row at the most. What a
        row cannot use, beyond the tokens seen, goes to the others in proportion; each keeps its
        protected tokens. Asked for with every prompt; while decoding, rows grow in proportion.
        Default: all the same.
        """
        return [[room.slots] * heads for heads in room.heads]

    def compete(self) -> Pool | None:
        """How rows compete for the budget by their scores. Default: they do not."""
        return None

    def demand(self, attention_BNS: Tensor, position_BHS: Tensor) -> Tensor:
        """What the observed attention of a prompt says of a layer's need of slots: fp32 `[B]`.

        For `share`, and only asked for where that is replaced.
        """
        raise NotImplementedError

    def share(self, demand_BL: Tensor) -> Tensor:
        """The weights by which compressed layers share the budget: `[B, L]`, fp64, above 0.

        demand_BL: their demands; NaN where a layer was not reached yet, which then gets the least
        weight that it can come to get. Default: all the same. See `Division` for the bounds.
        """
        return demand_BL.new_ones(demand_BL.shape)

    @property
    def texts(self) -> Sequence[str]:
        """What probes say in words, which the tokenizer turns into tokens; "" needs none."""
        return ()

    def probes(self, text: Text) -> Sequence[Probe]:
        """What is read behind a prompt to look at it a second time. Default: nothing.

        The prompt is then held whole until it was looked at; what `observe` asks for is recorded of
        the probes alone, `accumulate` keeps it, and only then slots are scored and selected.
        """
        return ()

    @property
    def calibrated(self) -> Calibrated | None:
        """What the policy must know of a model beforehand. Default: nothing."""
        return None

    def observe(self, step: Step) -> Observation | None:
        """What must be recorded while attending. Default: nothing."""
        return None

    def accumulate(self, slots: Slots) -> Tensor:
        """The new `mass_BHS` of every slot, kept with it from now on where `accumulates` is True.

        Default: the observed attention is added.
        """
        return slots.kept_mass_BHS + slots.observed_BHS

    @property
    def rank(self) -> Rank | None:
        """What is stored with a slot and ranks it, for policies that need no `score` of their own.

        A decode step that adds attention and ranks by this is one operator call per layer.
        """
        return None

    @property
    def needs(self) -> frozenset[Need]:
        """What `score`, `select`, `prune` and `probes` must be shown besides. Default: nothing.

        "query": the queries of the prompt. "rotation": how keys turn with their positions.
        "output": the output projection. "words": the tokens of a text as they are written, which
        needs the tokenizer.
        """
        return frozenset()

    def score(self, slots: Slots) -> Tensor:
        """How much each slot matters: fp32, any scale, `[B, H, S]`. Larger stays longer.

        Default: by `rank`.
        """
        if self.rank is None:
            raise NotImplementedError
        return ranking(self.rank, slots.position_BHS, slots.mass_BHS, slots.seen_B)

    def select(
        self, slots: Slots, score_BHS: Tensor, protected_BHS: Tensor, keep_BH: Tensor
    ) -> Tensor:
        """True for the slots that stay, exactly `min(keep, stored)` of each row.

        Default: the protected ones, then the largest scores.
        """
        return keep_top(score_BHS, slots.position_BHS, protected_BHS, keep_BH)

    def absorb(self) -> Merging | Refit | None:
        """What becomes of evicted slots: how they are merged into kept ones, or how kept ones are
        fitted to what all gave. Default: they are dropped.

        For a fit a prompt is held whole until it has passed all layers. A part of it is then read
        again behind it; in every layer, first, what stays is selected and fitted to its queries.
        """
        return None

    @property
    def residual(self) -> int:
        """Last tokens that stay as they came, for policies that replace `prune` or `pack`."""
        return 0

    @property
    def watched(self) -> int:
        """Last queries that `prune` wants to see, kept until old slots exist; or that `score` is to
        be shown while decoding, kept as long as tokens are decoded."""
        return 0

    def prune(self, window: Window) -> Channels:
        """The channels that old slots of some sequences keep, as many in every row.

        Asked for once per sequence, when its first slots become old. Default: all of them.
        """
        return Channels()

    def pack(self) -> Packing | None:
        """The bits of old slots. Default: as they came."""
        return None

    def retrieve(self, layer: int) -> Retrieval | None:
        """Which pages of a layer a decode step reads; all are kept. Default: all of them."""
        return None

    @property
    def name(self) -> str:
        """The name by which the policy is loaded: that of its module."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def limits(self) -> Limits | None:
        """The budget with its protected tokens; None for a policy without a budget."""
        if not hasattr(self, "budget"):
            return None
        common = [field.name for field in dataclasses.fields(Limits)]
        return Limits(**{name: getattr(self, name) for name in common if hasattr(self, name)})

    def overrides(self, stage: str) -> bool:
        """Whether this policy brings code of its own for a stage."""
        return getattr(type(self), stage) is not getattr(Policy, stage)

    def __str__(self) -> str:
        options = (f"{f.name}={as_text(getattr(self, f.name))}" for f in dataclasses.fields(self))
        text = ",".join(options)
        return f"{self.name}:{text}" if text else self.name


def stages_of(policy: Policy) -> set[str]:
    """The stages that a policy replaces."""
    stages = {stage.name for stage in STAGES if policy.overrides(stage.method)}
    if policy.compete() is None:
        stages.discard("compete")
    stages.discard("absorb" if isinstance(policy.absorb(), Refit) else "refit")
    if policy.rank is not None:
        stages.add("score")
    if policy.accumulates:
        stages.add("accumulate")
    return stages
