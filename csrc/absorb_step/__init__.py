"""One eviction per row while decoding, merged into the kept slot with the nearest key."""

from __future__ import annotations

from typing import Any

SCHEMA = (
    "absorb_step(Tensor(a!) key_PDS, Tensor(b!) value_PSE, Tensor(c!) position_PS,"
    " Tensor(d!)? mass_PS, Tensor table_RW, Tensor(e!) counts_R, Tensor seen_B, Tensor quota_R,"
    " Tensor recent_B, int sink, str rank, Tensor(f!) threshold_B, Tensor? frequency_F,"
    " bool interleaved, int start, int width, float own, float memory, float gain, bool largest,"
    " bool normalised, bool together, bool keys, bool sinks, bool counts) -> ()"
)


def fake(*args: Any) -> None:
    """Nothing is returned."""
