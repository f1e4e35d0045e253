"""The operators: defined once, with a backend for every device."""

from kvpress.ops.calls import (
    absorb_step,
    attend_blocks,
    attend_sums,
    attention_sums,
    channel_scores,
    decode_rows,
    decode_step,
    estimate_blocks,
    gather_slots,
    match_keys,
    pack,
    scatter_slots,
    unpack,
)
from kvpress.ops.registry import (
    backends,
    implementation,
    instruction_set,
    names,
    reason_of,
    refuse_settings,
)

__all__ = [
    "absorb_step",
    "attend_blocks",
    "attend_sums",
    "attention_sums",
    "backends",
    "channel_scores",
    "decode_rows",
    "decode_step",
    "estimate_blocks",
    "gather_slots",
    "implementation",
    "instruction_set",
    "match_keys",
    "names",
    "pack",
    "reason_of",
    "refuse_settings",
    "scatter_slots",
    "unpack",
]
