"""Policies: the contract by which a method replaces stages of the pipe.

All that a policy file needs of the engine is here.
"""

from kvpress.errors import PolicyError
from kvpress.formulas import expected, leverage, redundancy, ridge, shares
from kvpress.formulas.merging import KeyMerge, Merging
from kvpress.formulas.noise import NO_QUERY, uniform
from kvpress.formulas.ranking import gather, keep_top, protect, ranking
from kvpress.formulas.rotation import Rotation
from kvpress.formulas.structure import structural
from kvpress.formulas.sums import Observation, over_group
from kvpress.policy.base import Policy
from kvpress.policy.budget import Budget, share
from kvpress.policy.formats import Channels, Packing, Window
from kvpress.policy.options import option
from kvpress.policy.pooling import Calibrated, Pool, Room
from kvpress.policy.probes import Probe, Text, repetitions
from kvpress.policy.recipe import Recipe
from kvpress.policy.refit import Refit
from kvpress.policy.retrieval import Retrieval
from kvpress.policy.slots import Need, Queries, Slots, Step
from kvpress.policy.sparsity import Sparsity
from kvpress.policy.stages import STAGES
from kvpress.types import EMPTY, NoiseKind, Rank, Turned

__all__ = [
    "EMPTY",
    "NO_QUERY",
    "STAGES",
    "Budget",
    "Calibrated",
    "Channels",
    "KeyMerge",
    "Merging",
    "Need",
    "NoiseKind",
    "Observation",
    "Packing",
    "Policy",
    "PolicyError",
    "Pool",
    "Probe",
    "Queries",
    "Rank",
    "Recipe",
    "Refit",
    "Retrieval",
    "Room",
    "Rotation",
    "Slots",
    "Sparsity",
    "Step",
    "Text",
    "Turned",
    "Window",
    "expected",
    "gather",
    "keep_top",
    "leverage",
    "option",
    "over_group",
    "protect",
    "ranking",
    "redundancy",
    "repetitions",
    "ridge",
    "share",
    "shares",
    "structural",
    "uniform",
]
