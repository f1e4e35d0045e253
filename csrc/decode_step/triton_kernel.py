"""Triton kernels of `decode_step`: append, attend as `decode_rows` does, observe and evict.

Nothing is read back: which slot goes is found and overwritten on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from kvpress.csrc.decode_rows.triton_kernel import attend
from kvpress.csrc.decode_step import RANKS
from kvpress.csrc.decode_step.reference import check, check_choices, refuse_old
from kvpress.csrc.decode_step.triton_device import append_kernel, finish_kernel
from kvpress.csrc.triton_common import FUSED, NOISES, device_of, noise_stream
from torch import Tensor

from kvpress.ops.shapes import ages

LOGITS = 2048  # per block of `finish_kernel`


def decode_step(
    query_BN1D: Tensor,
    key_BH1D: Tensor,
    value_BH1E: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    position_PS: Tensor,
    mass_PS: Tensor | None,
    table_RW: Tensor,
    counts_R: Tensor,
    seen_B: Tensor,
    quota_R: Tensor,
    recent_B: Tensor,
    sink: int,
    evict: bool,
    rank: str,
    noise: str,
    tau: float,
    seed: int,
    layer: int,
    scaling: float,
    softcap: float,
    old: Sequence[Tensor] = (),
    layouts: Sequence[int] = (),
) -> Tensor:
    """Output `[B, N, 1, E]`; changes the pools and `counts_R` in place.

    The same as the reference, in three or four launches. Raises OperatorError.
    """
    refuse_old(old)
    new, pools = (query_BN1D, key_BH1D, value_BH1E), (key_PDS, value_PSE, position_PS, mass_PS)
    check(*new, *pools, table_RW, counts_R, seen_B, quota_R, recent_B)
    check_choices(rank, noise, tau, scaling, softcap, evict and mass_PS is None)
    ages("decode_step", seen_B, recent_B, sink, 1)
    append(key_BH1D, value_BH1E, *pools, table_RW, counts_R, seen_B)
    logits = None
    if mass_PS is not None:
        slots = table_RW.shape[1] * key_PDS.shape[2]
        shape = (*query_BN1D.shape[:3], slots)
        logits = torch.empty(shape, dtype=torch.float32, device=query_BN1D.device)
    attended = (key_PDS, value_PSE, table_RW, counts_R, scaling, softcap, logits)
    out_BN1E, lse_BN1 = attend(query_BN1D, *attended)
    if logits is None and not evict:
        return out_BN1E
    rows, heads = table_RW.shape[0], key_BH1D.shape[1]
    group = lse_BN1.numel() // rows
    block_g = triton.next_power_of_2(group)
    width, value_width = key_PDS.shape[1], value_PSE.shape[2]
    with device_of(query_BN1D):
        finish_kernel[(rows,)](
            *(key_PDS, value_PSE, position_PS, position_PS if mass_PS is None else mass_PS),
            *(lse_BN1 if logits is None else logits, lse_BN1, table_RW, counts_R, seen_B),
            *(quota_R, recent_B, sink, 1.0 / tau, noise_stream(seed, layer), table_RW.shape[1]),
            HEADS=heads,
            GROUP=group,
            D=width,
            E=value_width,
            PAGE=key_PDS.shape[2],
            OBSERVES=logits is not None,
            NOISE=NOISES[noise],
            PLAIN=noise == "none" and tau == 1.0,
            EVICTS=evict,
            RANK=RANKS.index(rank),
            BLOCK_G=block_g,
            BLOCK_S=max(64, LOGITS // block_g),
            BLOCK_D=triton.next_power_of_2(width),
            BLOCK_E=triton.next_power_of_2(value_width),
            num_warps=8,
            **FUSED,
        )
    return out_BN1E


def append(
    key_BH1D: Tensor,
    value_BH1E: Tensor,
    key_PDS: Tensor,
    value_PSE: Tensor,
    position_PS: Tensor,
    mass_PS: Tensor | None,
    table_RW: Tensor,
    counts_R: Tensor,
    seen_B: Tensor,
) -> None:
    """Writes the new token behind the others of its row and counts it."""
    width, value_width = key_PDS.shape[1], value_PSE.shape[2]
    with device_of(key_BH1D):
        append_kernel[(len(counts_R),)](
            *(key_BH1D, value_BH1E, key_PDS, value_PSE, position_PS),
            *(position_PS if mass_PS is None else mass_PS, table_RW, counts_R, seen_B),
            *(key_BH1D.stride(0), key_BH1D.stride(1), key_BH1D.stride(3)),
            *(value_BH1E.stride(0), value_BH1E.stride(1), value_BH1E.stride(3)),
            table_RW.shape[1],
            HEADS=key_BH1D.shape[1],
            D=width,
            E=value_width,
            PAGE=key_PDS.shape[2],
            KEEPS_MASS=mass_PS is not None,
            BLOCK_D=triton.next_power_of_2(width),
            BLOCK_E=triton.next_power_of_2(value_width),
            num_warps=2,
            **FUSED,
        )
