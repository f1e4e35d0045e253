"""No change of the code's order changes what policies do: a recorded run, bit for bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import recording


@pytest.fixture(scope="module")
def model() -> Any:
    return recording.model()


@pytest.mark.parametrize("recipe", recording.RECIPES)
def test_tokens_bytes_and_positions_are_as_recorded(model: Any, recipe: str) -> None:
    recorded = json.loads(recording.FILE.read_text(encoding="utf-8"))
    assert recording.record(model, recipe) == recorded[recipe]
