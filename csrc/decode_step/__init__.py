"""One decode step of one layer: append a token, attend, observe, evict at most one slot a row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SCHEMA = (
    "decode_step(Tensor query_BN1D, Tensor key_BH1D, Tensor value_BH1E, Tensor(a!) key_PDS,"
    " Tensor(b!) value_PSE, Tensor(c!) position_PS, Tensor(d!)? mass_PS, Tensor table_RW,"
    " Tensor(e!) counts_R, Tensor seen_B, Tensor quota_R, Tensor recent_B, int sink, bool evict,"
    " str rank, str noise, float tau, int seed, int layer, float scaling, float softcap,"
    " Tensor(f!)[] old, int[] layouts) -> Tensor out_BN1E"
)
RANKS = ("mass", "mass_per_age", "position")


def fake(query_BN1D: Tensor, key_BH1D: Tensor, value_BH1E: Tensor, *args: Any) -> Tensor:
    """An empty result of the right shape and dtype."""
    return query_BN1D.new_empty(*query_BN1D.shape[:3], value_BH1E.shape[3])
