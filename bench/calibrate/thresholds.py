"""The thresholds that a policy has for a model."""

from __future__ import annotations

from typing import Any


def thresholds_of(model: Any, policy: str) -> Any:
    """The thresholds of a policy for this model. Raises PolicyError."""
    from kvpress.errors import PolicyError
    from kvpress.hf import calibration
    from kvpress.hf.support import check_model
    from kvpress.policy.loading import parse

    limits = calibration.thresholds(parse(policy).sparsity, model, check_model(model))
    if limits is None:
        raise PolicyError(
            f"policy={policy} computes all of a prompt's attention. Give one that makes it sparse,"
            " as sale."
        )
    return limits
