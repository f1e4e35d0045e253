"""Attention of prompts over what is stored: every path of it against the plain formula."""

from __future__ import annotations

import pytest
import torch

from kvpress.formulas.attention import prompt_attention
from kvpress.types import EMPTY


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("new", "stored"), [(1, 9), (7, 0), (300, 41), (600, 5)])
def test_new_tokens_see_what_is_stored_and_those_before_them(
    new: int, stored: int, holes: bool
) -> None:
    generator = torch.Generator().manual_seed(new)
    slots = stored + new
    query = torch.randn(2, 4, new, 8, generator=generator)
    key, value = (torch.randn(2, 2, slots, 8, generator=generator) for _ in range(2))
    position = torch.arange(slots).repeat(2, 2, 1)
    if holes:
        position[1, 0, : stored // 2] = EMPTY
    logits = query @ key.repeat_interleave(2, 1).mT * 0.3
    hidden = torch.arange(slots) > torch.arange(stored, slots)[:, None]
    hidden = hidden | (position == EMPTY).repeat_interleave(2, 1)[:, :, None]
    wanted = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    found = prompt_attention(query, key, value, position, 0.3)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
