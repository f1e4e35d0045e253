"""Keep everything: the uncompressed baseline, token for token what transformers generates.

Differs from the paper: there is no paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpress.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Replaces no stage."""
