"""The weights that a training begins with: a head that knows what most attention far back is.

Recent tokens first, and what followed the present words where they stood before. A training of a
few minutes then has to find out how much each is worth, not that it exists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvpress.formulas.rotation import Rotation
from kvpress.hf.heads.distilled import Sizes, normed

_NEAREST, _FARTHEST = 64, 16384  # tokens back, between which attention falls as a power
_RIDGE = 0.1
_POWERS = (0.7, 1.0, 0.7)  # of the distance, by which query heads begin to fall
_SHARPNESS = (1.2, 0.3, 0.6)  # how much words count in them
_SHIFTS = (1, 1, 0)  # a key's offset that is compared with a query's: 1 is what followed
_STATIC = 2.0  # of the keys' channels that say where a token is
_SMALL = 0.1


def weights_of(sizes: Sizes, embedded_YX: Tensor, seed: int) -> dict[str, Tensor]:
    """The first weights. embedded_YX: of the words that the texts have.

    Offset i of a query and offset i + 1 of a key are made by one random matrix: a key then fits a
    query whose last tokens are those before the key's own. Some query heads compare offset i with
    offset i instead: they look for the present word itself.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = sizes.shapes()
    made = {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        for name, shape in shapes.items()
    }
    made["token"], made["token_bias"] = _whitening(embedded_YX, sizes.channels)
    made["mixed"] *= _SMALL
    key_HDSC = made["key"].view(sizes.heads, sizes.width, sizes.slots, -1).clone()
    turned = 2 * sizes.pairs
    key_HDSC[:, :turned] *= _SMALL
    query_HGDSC = torch.zeros(sizes.heads, sizes.group, *key_HDSC.shape[1:])
    query_bias_HGD = torch.zeros(sizes.heads, sizes.group, sizes.width)
    key_bias_HD = torch.zeros(sizes.heads, sizes.width)
    key_bias_HD[:, : sizes.pairs] = _STATIC
    decay_C = _decay(sizes.rotation()) * math.sqrt(sizes.width) / _STATIC
    for number in range(sizes.group):
        kind = number % len(_POWERS)
        back = sizes.window - _SHIFTS[kind]
        query_HGDSC[:, number, :, :back] = key_HDSC[..., _SHIFTS[kind] :, :][..., :back, :]
        query_HGDSC[:, number] *= _SHARPNESS[kind]
        query_bias_HGD[:, number, :turned] = _POWERS[kind] * decay_C
    made |= {"query": query_HGDSC, "query_bias": query_bias_HGD}
    made |= {"key": key_HDSC, "key_bias": key_bias_HD}
    return {name: made[name].reshape(shape).contiguous() for name, shape in shapes.items()}


def _whitening(embedded_YX: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """A projection to channels that differ as much as they can between words, and its bias.

    Embeddings have much in common, and two of them are always alike: of what is left when that is
    taken away, the largest principal components, all of one size.
    """
    word_YX = normed(embedded_YX.double())
    mean_X = word_YX.mean(0)
    centred_YX = word_YX - mean_X
    size, axis_XX = torch.linalg.eigh(centred_YX.T @ centred_YX / len(word_YX))
    some = min(channels, len(size))
    scale_C = size[-some:].clamp_min(1e-6).rsqrt()
    token_CX = torch.zeros(channels, len(mean_X), dtype=torch.float64)
    token_CX[:some] = axis_XX[:, -some:].T * scale_C[:, None]
    return token_CX.float(), -(token_CX @ mean_X).float()


def _decay(rotation: Rotation) -> Tensor:
    """What a query adds to turned channels, so that q·k falls as -ln(distance): fp32 `[2F]`.

    For keys whose first channel of each pair is 1 and whose second is 0: the least squares of
    cosines and sines of the distance.
    """
    ends = (math.log(_NEAREST), math.log(_FARTHEST))
    log_A = torch.linspace(*ends, 400, dtype=torch.float64)
    angle_AF = log_A.exp()[:, None] * rotation.frequency_F.double()
    one_A1 = torch.ones(len(log_A), 1, dtype=torch.float64)
    part_AX = torch.cat([angle_AF.cos(), -angle_AF.sin(), one_A1], dim=1)
    square_XX = part_AX.T @ part_AX + _RIDGE * torch.eye(part_AX.shape[1], dtype=torch.float64)
    found_X: Tensor = torch.linalg.solve(square_XX, part_AX.T @ -log_A)
    return found_X[:-1].float()
