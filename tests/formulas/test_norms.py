"""What attention adds to the hidden state."""

from __future__ import annotations

import torch

from kvpress.formulas.norms import grams, output_norms


def test_norms_are_those_of_values_behind_the_projection() -> None:
    torch.manual_seed(0)
    value_BHSE, weight_CX = torch.randn(2, 2, 5, 3), torch.randn(7, 12)
    found_BNS = output_norms(value_BHSE, grams(weight_CX, 3))
    for head in range(4):
        part_BSE = value_BHSE[:, head // 2]
        wanted_BS = (part_BSE @ weight_CX[:, 3 * head : 3 * head + 3].T).norm(dim=-1)
        torch.testing.assert_close(found_BNS[:, head], wanted_BS)
