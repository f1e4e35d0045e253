"""What attention to a slot adds to the hidden state, relative to it (arXiv 2601.07891)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Norms(NamedTuple):
    """What a layer knows of its hidden states while a probe passes it.

    hidden_BQ: the norms of the attention's inputs, of a padded batch of tokens. weight_CX: of its
    output projection; X goes through the query heads and the channels of their values.
    """

    hidden_BQ: Tensor
    weight_CX: Tensor


def grams(weight_CX: Tensor, width: int) -> Tensor:
    """WᵀW of the columns W of each query head: fp32 `[N, E, E]`. width: E, channels of a value."""
    weight_CNE = weight_CX.float().view(len(weight_CX), -1, width)
    return torch.einsum("cne,cnf->nef", weight_CNE, weight_CNE)


def output_norms(value_BHSE: Tensor, gram_NEF: Tensor) -> Tensor:
    """|W v| of every slot and query head, W being the columns of that head: fp32 `[B, N, S]`.

    From the Gram matrices WᵀW, which are as small as a head is.
    """
    batch, heads, slots, width = value_BHSE.shape
    gram_HGEF = gram_NEF.view(heads, -1, width, width)
    value = value_BHSE.float()
    turned = torch.einsum("bhse,hgef->bhgsf", value, gram_HGEF)
    square_BHGS = (turned * value[:, :, None]).sum(-1)
    return square_BHGS.clamp_min(0.0).sqrt().reshape(batch, -1, slots)
