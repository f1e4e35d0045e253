"""The cases of `match_keys`, beside plain PyTorch: normalise, multiply, maximum, in blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from kvpress.bench.common.timing import Call
from kvpress.bench.operators import probe
from kvpress.bench.operators.registry import Case, difference
from torch import Tensor

from kvpress import ops

CHECKED = 700  # evicted keys of a check, which holds the whole matrix in float64
SEED = 20
ROUNDING = 1e-5  # cosines that are closer may change places


@dataclass(frozen=True, kw_only=True)
class MatchShape:
    """Evicted and kept keys of each of `heads` rows."""

    evicted: int
    kept: int
    heads: int
    width: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The shape in letters, and the dtype."""
        letters = f"H{self.heads}-E{self.evicted}-C{self.kept}-D{self.width}"
        return f"{letters}-{'fp32' if self.dtype == torch.float32 else 'bf16'}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "evicted": self.evicted,
            "kept": self.kept,
            "kv_heads": self.heads,
            "width": self.width,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def bytes(self) -> int:
        """Bytes of the keys and of what may be a target, and of the results."""
        keys = (self.evicted + self.kept) * self.width * self.dtype.itemsize
        return self.heads * (keys + self.kept + self.evicted * 12)

    @property
    def flops(self) -> int:
        """Operations of the products."""
        return 2 * self.heads * self.evicted * self.kept * self.width


def match_keys_case(shape: MatchShape) -> Case:
    """Every evicted key of some rows, and all kept keys allowed."""
    return Case(
        group="match_keys",
        name=shape.name,
        parameters=shape.parameters,
        bytes=shape.bytes,
        flops=shape.flops,
        bound="flops",
        prepare=partial(_prepare, shape),
        check=partial(_check, shape),
        other_work={"probe": 2 * probe.side(shape.flops) ** 3},
    )


def _operands(shape: MatchShape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(SEED)
    evicted_BHVD, kept_BHKD = (
        torch.randn(1, shape.heads, n, shape.width, generator=generator, device=device)
        for n in (shape.evicted, shape.kept)
    )
    allowed_BHK = torch.ones(kept_BHKD.shape[:3], dtype=torch.bool, device=device)
    return evicted_BHVD.to(shape.dtype), kept_BHKD.to(shape.dtype), allowed_BHK


def _prepare(shape: MatchShape, device: torch.device) -> dict[str, Call]:
    """One copy of the operands: the limit is arithmetic, and a compression has just made them."""
    operands = _operands(shape, device)
    # CPUs widen the keys.
    multiplied = torch.float32 if device.type == "cpu" else shape.dtype
    return {
        "probe": probe.matmul(shape.flops, multiplied, device),
        "match_keys": lambda number: ops.match_keys(*operands),
        "pytorch": lambda number: _pytorch(*operands[:2]),
    }


def _pytorch(evicted_BHVD: Tensor, kept_BHKD: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write without the operator, in blocks of 4 MiB of cosines."""
    kept_BHDK = torch.nn.functional.normalize(kept_BHKD.float(), dim=-1).mT
    step = max(1, (1 << 20) // (kept_BHKD.shape[1] * kept_BHKD.shape[2]))
    found = [
        (torch.nn.functional.normalize(block_BHvD.float(), dim=-1) @ kept_BHDK).max(-1)
        for block_BHvD in torch.split(evicted_BHVD, step, 2)
    ]
    similarities, targets = zip(*found, strict=True)
    return torch.cat(similarities, 2), torch.cat(targets, 2)


def _check(shape: MatchShape, device: torch.device) -> str | None:
    small = replace(shape, evicted=min(shape.evicted, CHECKED))
    evicted_BHVD, kept_BHKD, allowed_BHK = _operands(small, device)
    allowed_BHK[..., ::7] = False
    operands = (evicted_BHVD, kept_BHKD, allowed_BHK)
    similarity, target = ops.match_keys(*operands)
    plain, _ = ops.implementation("match_keys", "reference")(*operands)
    evicted, kept = (torch.nn.functional.normalize(x.double(), dim=-1) for x in operands[:2])
    cosine_BHVK = (evicted @ kept.mT).masked_fill(~allowed_BHK[:, :, None], -torch.inf)
    best = cosine_BHVK.topk(2)
    clear = best.values[..., 0] - best.values[..., 1] > ROUNDING
    if not torch.equal(target[clear], best.indices[..., 0][clear]):
        return "targets differ from those of the formula"
    return difference("similarity", similarity, plain, best.values[..., 0])
