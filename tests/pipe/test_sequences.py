"""What belongs to a sequence is said in one place, and follows it everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

import kvpress
from kvpress.pipe.state import layer
from kvpress.pipe.state.sequences import Sequences, counter


@dataclass
class More(Sequences):
    """As an author of a new stage would do it: one line for each field."""

    luck_B: torch.Tensor = counter(7)
    worth_R: torch.Tensor = counter(0.5, torch.float64)


def test_a_new_field_is_begun_selected_cloned_saved_and_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layer, "Sequences", More)

    def found(cache: Any) -> list[tuple[list[int], list[float]]]:
        own = [state.sequences for state in cache.states]
        return [(s.luck_B.tolist(), s.worth_R.tolist()) for s in own]

    with kvpress.attach(helpers.tiny(), "h2o:budget=0.5") as engine, torch.no_grad():
        cache = engine.new_cache()
        engine.model(helpers.prompt(3, 20), past_key_values=cache)
        heads = cache.states[0].kind.heads
        assert found(cache) == [([7] * 3, [0.5] * (3 * heads))] * len(cache.states)
        for state in cache.states:
            state.sequences.luck_B = torch.tensor([1, 2, 3])
            state.sequences.worth_R = torch.arange(3.0 * heads, dtype=torch.float64)
        cache.select([2, 0])
        rows = [row for b in (2, 0) for row in range(b * heads, (b + 1) * heads)]
        wanted = [([3, 1], [float(row) for row in rows])] * len(cache.states)
        assert found(cache) == wanted
        fork = cache.fork()
        cache.states[0].sequences.luck_B += 1
        assert found(fork) == wanted
        fork.save(tmp_path / "cache")
        assert found(engine.load_cache(tmp_path / "cache")) == wanted
