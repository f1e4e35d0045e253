"""Tiers on a GPU: pinned memory, a copy stream, and the same answers wherever pages are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor

import kvpress

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
POLICIES = ["full", "snapkv:budget=0.5", "quant", "keyformer:budget=0.5+quant"]


@pytest.mark.parametrize("policy", POLICIES)
def test_logits_do_not_depend_on_where_pages_are(policy: str, tmp_path: Path) -> None:
    model = helpers.sharp("llama").cuda()
    ids_BQ = helpers.prompt(2, 700).cuda()
    disk = f"64MiB:{tmp_path}"
    every = [
        _logits(model, ids_BQ, policy, device="64MiB"),
        _logits(model, ids_BQ, policy, device="2MiB", host="64MiB"),
        _logits(model, ids_BQ, policy, device="2MiB", host="1MiB", disk=disk),
    ]
    assert all(other.equal(every[0]) for other in every[1:])


def _logits(model: Any, ids_BQ: Tensor, policy: str, **caps: str) -> Tensor:
    with kvpress.attach(model, policy, **caps) as engine:
        out = engine.generate(
            ids_BQ,
            max_new_tokens=40,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(out.logits)
