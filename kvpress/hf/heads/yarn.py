"""Rotary frequencies for more positions than a model was trained on (YaRN, arXiv 2309.00071)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvpress import host

_FAST, _SLOW = 32.0, 1.0  # full turns over the trained positions, section 3.2


def frequencies(width: int, theta: float, factor: float, trained: int) -> tuple[Tensor, float]:
    """Radians per position of each pair of channels, fp32 `[F]`, and what states are scaled by.

    width: channels that turn. theta: of the RoPE. factor: wanted positions by trained ones; up to 1
    nothing changes. Pairs that turn often over the trained positions stay as they are, those that
    never turn once are slowed by the factor, and between them both are blended (equations 19–23);
    q and k are scaled by 0.1 ln(factor) + 1 each (equation 24).
    """
    pair_F = host.arange(0, width, 2).float() / width
    plain_F = 1.0 / (theta**pair_F)
    if factor <= 1:
        return plain_F, 1.0
    low, high = (_pair_of(turns, width, theta, trained) for turns in (_FAST, _SLOW))
    low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
    place_F = host.arange(width // 2).float()
    slowed_F = ((place_F - low) / max(high - low, 1e-3)).clamp(0, 1)
    blended_F = torch.lerp(plain_F, plain_F / factor, slowed_F)
    return blended_F, 0.1 * math.log(factor) + 1.0


def _pair_of(turns: float, width: int, theta: float, trained: int) -> float:
    """The pair, as a real number, that turns so often over the trained positions."""
    return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
