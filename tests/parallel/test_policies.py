"""Every policy, divided among processes: the tokens, positions and bytes of one process.

Models are in fp32, the widest that the engine stores, and their logits are far apart: a sum over
processes is rounded in another order, which moves no token here. Kept positions are compared
exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import ranks
import torch

from kvpress.formulas.shares import FRACTIONS
from kvpress.hf import learned

NEW = 8
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
# What depends on the other heads of a layer, of all layers, or on files, besides each policy.
MORE = (
    "adakv:scope=model+snapkv:budget=0.4,window=8",
    "adakv+h2o:budget=0.5",
    "adakv+keyformer:budget=0.5",
    "d2o:budget=0.4,mode=official_code,full_first=0,full_last=0",
    "d2o:budget=0.4,layers=uniform",
    "kvzip:instruction=,further=,scope=layer,budget=0.4",
    "kvzip:instruction=,further=,normalise=true",
    "sale:threshold=0.01,least=1,local=4",
    "h2o:budget=40KiB",
    "h2o:budget=0.5+quant+think",
    "adakv+h2o:budget=0.5+quant+think",
    "quest:read=0.4,page=32,cells=0",
    "specontext:head=self,read=0.4",
)
CALIBRATED = ("heads:calibration={}+h2o:budget=0.4", "zap:calibration={}", "sale:least=1")
CALIBRATED += ("zap:calibration={},threshold=-2.0", "triattention:calibration={},interval=3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    ranks.distributed()
    model = helpers.sharp("llama", **HEADS)
    model.name_or_path = str(tmp_path_factory.mktemp("model"))
    model.save_pretrained(model.name_or_path)
    return model


@pytest.fixture(scope="module")
def policies(model: Any) -> list[str]:
    """Specifications of all policies; what they must know of the model lies beside it."""
    path = Path(model.name_or_path) / "known.kvpress"
    draw = torch.Generator().manual_seed(0)
    share_LH = torch.rand(3, 4, generator=draw) + 0.1
    share_LHX = torch.stack([(share_LH / share_LH.mean() * f).clamp_max(1) for f in FRACTIONS], -1)
    ridge_LXH = torch.randn(3, 137, 4, generator=draw) / 8
    tensors = {"share_LHX": share_LHX, "ridge_LXH": ridge_LXH}
    tensors["query_LND"] = torch.randn(3, 8, 16, generator=draw)
    tensors["length_LNF"] = torch.rand(3, 8, 8, generator=draw) + 3
    learned.write(path, model, "heads", learned.Learned(tensors, {}, 1, True))
    every = [*helpers.recipes().values(), *MORE, *(x.format(path) for x in CALIBRATED)]
    return list(dict.fromkeys(every))


def outcomes(model: Any, policies: list[str], ids: torch.Tensor) -> dict[str, ranks.Outcome]:
    return {policy: ranks.outcome(model, policy, ids, NEW) for policy in policies}


def in_parts(
    rank: int, world: int, path: Path, policies: list[str], ids: torch.Tensor
) -> dict[str, ranks.Outcome]:
    return outcomes(ranks.divided(path, world), policies, ids)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_say_and_keep_what_one_does(model: Any, policies: list[str], world: int) -> None:
    """In four processes: those whose rows depend on each other, or on a file."""
    ids = helpers.prompt(2, 61)
    if world == 4:
        some = ("adakv:", "d2o", "keyformer", "r_kv", "tova", "triattention", "zap")
        policies = [x for x in policies if x.startswith(some)]
    alone = outcomes(model, policies, ids)
    parts = ranks.together(world, in_parts, Path(model.name_or_path), policies, ids)
    for policy in policies:
        ranks.check(alone[policy], [part[policy] for part in parts])


def test_the_policies_are_all_there(policies: list[str]) -> None:
    named = {part.partition(":")[0] for policy in policies for part in policy.split("+")}
    assert named == set(helpers.available())
