"""Shared fixtures: a fixed seed for every test, and the real model once per run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Not this folder itself: its folder `kvpress` would be taken for the package.
sys.path.insert(0, str(Path(__file__).parent / "tools"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def demo() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; skips where its package is not installed."""
    models = pytest.importorskip("kvpress.bench.common.models")
    try:
        return models.load("demo")
    except models.ModelError as error:
        pytest.skip(str(error))
