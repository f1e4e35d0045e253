"""Shared fixtures: a fixed seed for every test, and the real model once per run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Not this folder itself: its folder `kvpress` would be taken for the package.
sys.path.insert(0, str(Path(__file__).parent / "tools"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--few",
        action="store_true",
        help="Of the cases of each test, those with other families of models aside, only the last.",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What another Python or library breaks, it breaks in every case of a test, or in a family."""
    if not config.getoption("--few"):
        return
    last = {_function_and_family(item): item for item in items}
    chosen = {id(item) for item in last.values()}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


def _function_and_family(item: pytest.Item) -> tuple[str, ...]:
    case = getattr(item, "callspec", None)
    family = case.params.get("family", "") if case else ""
    return item.nodeid.partition("[")[0], str(family)


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
