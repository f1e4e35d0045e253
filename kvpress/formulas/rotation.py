"""How keys turn with their positions (RoPE: Su et al., arXiv 2104.09864, equation 15)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """How the keys of a layer turn: pair f of channels by `frequency_F[f]` radians per position.

    frequency_F: fp32. interleaved: whether pairs are channels (2f, 2f + 1) instead of (f, f + F).
    start: the first rotated channel; those outside `[start, start + 2F)` carry no position.
    """

    frequency_F: Tensor
    interleaved: bool = False
    start: int = 0

    def turn(self, key_XD: Tensor, by_X: Tensor) -> Tensor:
        """Keys of positions p as they are at positions p + by: fp32 `[..., D]`.

        by_X: whole numbers, also below 0, that broadcast to the leading dimensions of the keys.
        """
        return self._turned(key_XD, *self._angles(by_X))

    def mean(self, by_BP: Tensor, width: int) -> Tensor:
        """The mean of turns, as a matrix: `x @ mean` is the mean of the rows `x` turned by each.

        fp32 `[B, D, D]`. by_BP: whole numbers. width: D, channels of a key.
        """
        unit_1DD = torch.eye(width, dtype=torch.float32, device=by_BP.device)[None]
        cos_BPF, sin_BPF = self._angles(by_BP)
        means = cos_BPF.mean(1)[:, None], sin_BPF.mean(1)[:, None]
        return self._turned(unit_1DD.expand(len(by_BP), -1, -1), *means)

    def lengths(self, key_XD: Tensor) -> Tensor:
        """The lengths of the pairs that turn, which no turn changes: fp32 `[..., F]`."""
        a_XF, b_XF = self._pairs(key_XD.float()[..., self._turning])
        return torch.hypot(a_XF, b_XF)

    def _angles(self, by_X: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the pairs turned."""
        # In fp32, as models do it: then the angles are theirs to the last bit.
        angle_XF = by_X[..., None].float() * self.frequency_F.to(by_X.device)
        return angle_XF.cos(), angle_XF.sin()

    def _turned(self, key_XD: Tensor, cos_XF: Tensor, sin_XF: Tensor) -> Tensor:
        turning, key_XD = self._turning, key_XD.float()
        a_XF, b_XF = self._pairs(key_XD[..., turning])
        turned = (a_XF * cos_XF - b_XF * sin_XF, a_XF * sin_XF + b_XF * cos_XF)
        part_XP = torch.stack(turned, self._between).flatten(-2)
        before, after = key_XD[..., : turning.start], key_XD[..., turning.stop :]
        return torch.cat((before, part_XP, after), dim=-1)

    @property
    def _turning(self) -> slice:
        """The channels that turn."""
        return slice(self.start, self.start + 2 * len(self.frequency_F))

    @property
    def _between(self) -> int:
        """The dimension in which the two channels of a pair lie, where pairs have one."""
        return -1 if self.interleaved else -2

    def _pairs(self, part_XP: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second channels of the pairs."""
        pairs = len(self.frequency_F)
        sizes = (pairs, 2) if self.interleaved else (2, pairs)
        a_XF, b_XF = part_XP.reshape(*part_XP.shape[:-1], *sizes).unbind(self._between)
        return a_XF, b_XF
