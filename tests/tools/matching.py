"""The formula of `match_keys` in float64, and the assertion that results agree with it."""

from __future__ import annotations

import torch

ROUNDING = 4e-6  # of a cosine in fp32; closer ones may change places


def operands(
    batch: int,
    heads: int,
    evicted: int,
    kept: int,
    width: int,
    dtype: torch.dtype,
    size: float = 1.0,
    device: str = "cpu",
) -> list[torch.Tensor]:
    """Random keys as a model makes them, heads and tokens transposed; a third is not allowed.

    In each row one evicted and one allowed kept key is zero. `size` is that of the keys' numbers.
    """
    made = [torch.randn(batch, n, heads, width).mul(size).to(dtype) for n in (evicted, kept)]
    allowed = torch.rand(batch, heads, kept) > 1 / 3
    for keys in made:
        keys[:, keys.shape[1] // 2 :][:, :1] = 0
    allowed[..., kept // 2 :][..., :1] = True
    return [
        made[0].transpose(1, 2).to(device),
        made[1].transpose(1, 2).to(device),
        allowed.to(device),
    ]


def along_axes(device: str = "cpu") -> tuple[list[torch.Tensor], list[int]]:
    """One row of keys along 5 axes, whose cosines no order of sums can round, and the targets.

    Every direction comes back 40 times, longer each time; the first 7 slots are not allowed.
    """
    longer = 2.0 ** torch.arange(40).repeat_interleave(5)[:, None]
    kept, evicted = torch.eye(5).repeat(40, 1) * longer, torch.eye(5).flip(0) * 3
    tensors = (evicted, kept, torch.arange(200) > 6)
    return [x[None, None].to(device) for x in tensors], [9, 8, 7, 11, 10]


def cosines(evicted: torch.Tensor, kept: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """All of them in float64, -inf where a kept key is not allowed."""
    evicted, kept = (
        torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-60) for x in (evicted, kept)
    )
    return (evicted @ kept.mT).masked_fill(~allowed[:, :, None], -torch.inf)


def agree(
    given: tuple[torch.Tensor, torch.Tensor], plain: torch.Tensor, tensors: list[torch.Tensor]
) -> None:
    """Asserts the tolerance rule for similarities, and the targets where no other is as close.

    plain: the similarities of PyTorch in fp32.
    """
    similarity, target = given
    exact = cosines(*tensors)
    best, index = exact.max(-1)
    assert similarity.dtype == torch.float32 and target.dtype == torch.int64
    assert similarity.shape == target.shape == best.shape
    found = best > -torch.inf
    assert torch.equal(similarity == -torch.inf, ~found) and (target[~found] == -1).all()
    error, allowed = ((x.double() - best)[found].abs() for x in (similarity, plain))
    assert not found.any() or error.max() <= 2 * allowed.max() + 2e-6
    others = exact.scatter(-1, index[..., None], -torch.inf)
    clear = found & (best - others.max(-1).values > ROUNDING)
    assert torch.equal(target[clear], index[clear])
    chosen = exact.gather(-1, target.clamp_min(0)[..., None])[..., 0]
    assert (chosen >= best - ROUNDING)[found].all()
