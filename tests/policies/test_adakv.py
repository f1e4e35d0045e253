"""AdaKV: budgets by score inside a layer, with its safeguard."""

from __future__ import annotations

import helpers
import pytest
import torch

import kvpress
from kvpress.formulas.apportion import by_score
from kvpress.policy import Pool
from kvpress.policy.loading import load_policy


def test_the_worked_example_of_the_specification() -> None:
    # Of the top four places of the layer all are in the first row; one place is guaranteed.
    score = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.5, 0.1, 0.05, 0.01]])
    own = torch.tensor([1, 1])
    assert by_score(score, torch.ones(2, 4, dtype=torch.bool), 4, own).tolist() == [3, 1]


def test_the_safeguard_is_a_fifth_as_published_and_the_scope_a_layer() -> None:
    assert load_policy("adakv").compete() == Pool("layer", 0.2)
    assert load_policy("adakv", scope="model", least=0.0).compete() == Pool("model", 0.0)


@pytest.mark.parametrize("scorer", ["snapkv:budget=0.3,window=4", "h2o:budget=0.3,recent=4"])
@torch.no_grad()
def test_every_row_keeps_its_own_part_and_layers_keep_their_sum(scorer: str) -> None:
    model, ids = helpers.sharp("llama"), helpers.prompt(1, 100)
    with kvpress.attach(model, f"{scorer}+adakv:least=0.5") as engine:
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        kept = [layer[0] for layer in cache.report().slots_kept]
    assert all(sum(layer) == 60 and min(layer) >= 15 for layer in kept)
    assert any(layer != [30, 30] for layer in kept)
