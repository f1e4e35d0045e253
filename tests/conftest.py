"""Shared fixtures: a fixed seed for every test, and the real model once per run."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Not this folder itself: its folder `kvpress` would be taken for the package.
sys.path.insert(0, str(Path(__file__).parent / "tools"))


# What else runs on a machine decides how long a case takes.
settings.register_profile("kvpress", deadline=None)
settings.load_profile("kvpress")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        type=int,
        metavar="N",
        help="At most so many cases of each test, of each family of models; default: all of them.",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves cases that are evenly spread over all of a test, its last one among them."""
    most = config.getoption("--cases")
    if most is None:
        return
    alike: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        case = getattr(item, "callspec", None)
        family = str(case.params.get("family", "")) if case else ""
        alike[item.nodeid.partition("[")[0], family].append(item)
    chosen = {
        id(cases[(i + 1) * len(cases) // min(most, len(cases)) - 1])
        for cases in alike.values()
        for i in range(min(most, len(cases)))
    }
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


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
