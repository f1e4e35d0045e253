"""Triton kernels of `decode_step`: append, attend as `decode_rows` does, observe and evict.

Nothing is read back: which slot goes is found and overwritten on the device.
"""

from __future__ import annotations

import torch
import triton
from kvpress.csrc.decode_rows.triton_kernel import attend
from kvpress.csrc.decode_step import RANKS, Operands
from kvpress.csrc.decode_step.reference import check, refuse_old
from kvpress.csrc.decode_step.triton_device import append_kernel, finish_kernel
from kvpress.csrc.triton_common import FUSED, NOISES, device_of, noise_stream
from torch import Tensor

LOGITS = 2048  # per block of `finish_kernel`


def decode_step(operands: Operands) -> Tensor:
    """Output `[B, N, 1, E]`; changes the pools and `counts_R` in place.

    The same as the reference, in three or four launches. Raises OperatorError.
    """
    refuse_old(operands.old)
    check(operands)
    query_BN1D, pages = operands.token.query_BN1D, operands.pages
    _append(operands)
    logits_BN1S = None
    if operands.columns.mass_PS is not None:
        slots = pages.table_RW.shape[1] * pages.key_PDS.shape[2]
        shape = (*query_BN1D.shape[:3], slots)
        logits_BN1S = torch.empty(shape, dtype=torch.float32, device=query_BN1D.device)
    out_BN1E, lse_BN1 = attend(query_BN1D, pages, operands.logits, logits_BN1S)
    if logits_BN1S is not None or operands.evict:
        _finish(operands, logits_BN1S, lse_BN1)
    return out_BN1E


def _append(operands: Operands) -> None:
    """Writes the new token behind the others of its row and counts it."""
    pages, (position, mass) = operands.pages, operands.columns
    _, key_BH1D, value_BH1E = operands.token
    width, value_width = pages.key_PDS.shape[1], pages.value_PSE.shape[2]
    with device_of(key_BH1D):
        append_kernel[(len(pages.counts_R),)](
            *(key_BH1D, value_BH1E, pages.key_PDS, pages.value_PSE, position),
            *(position if mass is None else mass, pages.table_RW, pages.counts_R),
            operands.bounds.seen_B,
            *(key_BH1D.stride(0), key_BH1D.stride(1), key_BH1D.stride(3)),
            *(value_BH1E.stride(0), value_BH1E.stride(1), value_BH1E.stride(3)),
            pages.table_RW.shape[1],
            HEADS=key_BH1D.shape[1],
            D=width,
            E=value_width,
            PAGE=pages.key_PDS.shape[2],
            KEEPS_MASS=mass is not None,
            BLOCK_D=triton.next_power_of_2(width),
            BLOCK_E=triton.next_power_of_2(value_width),
            num_warps=2,
            **FUSED,
        )


def _finish(operands: Operands, logits_BN1S: Tensor | None, lse_BN1: Tensor) -> None:
    """Observes and evicts."""
    pages, (position, mass), bounds = operands.pages, operands.columns, operands.bounds
    kind, tau, seed, layer, first = operands.noise
    rows, width, value_width = len(pages.table_RW), pages.key_PDS.shape[1], pages.value_PSE.shape[2]
    group = lse_BN1.numel() // rows
    block_g = triton.next_power_of_2(group)
    with device_of(lse_BN1):
        finish_kernel[(rows,)](
            *(pages.key_PDS, pages.value_PSE, position, position if mass is None else mass),
            *(lse_BN1 if logits_BN1S is None else logits_BN1S, lse_BN1, pages.table_RW),
            *(pages.counts_R, *bounds[:4], 1.0 / tau, noise_stream(seed, layer, first)),
            pages.table_RW.shape[1],
            HEADS=operands.token.key_BH1D.shape[1],
            GROUP=group,
            D=width,
            E=value_width,
            PAGE=pages.key_PDS.shape[2],
            OBSERVES=logits_BN1S is not None,
            NOISE=NOISES[kind],
            PLAIN=kind == "none" and tau == 1.0,
            EVICTS=operands.evict,
            RANK=RANKS.index(bounds.rank),
            BLOCK_G=block_g,
            BLOCK_S=max(64, LOGITS // block_g),
            BLOCK_D=triton.next_power_of_2(width),
            BLOCK_E=triton.next_power_of_2(value_width),
            num_warps=8,
            **FUSED,
        )
