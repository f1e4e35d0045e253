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
    parser.addoption(
        "--families",
        type=int,
        metavar="N",
        help="At most so many families of models in each test; default: all of them.",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves cases that are evenly spread over all of a test, its last one among them."""
    most, families = config.getoption("--cases"), config.getoption("--families")
    if families is not None:
        _keep(config, items, _of_families(items, families))
    if most is None:
        return
    alike: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        alike[item.nodeid.partition("[")[0], _family(item)].append(item)
    chosen = {
        id(cases[(i + 1) * len(cases) // min(most, len(cases)) - 1])
        for cases in alike.values()
        for i in range(min(most, len(cases)))
    }
    _keep(config, items, chosen)


def _keep(config: pytest.Config, items: list[pytest.Item], chosen: set[int]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]


def _family(item: pytest.Item) -> str:
    case = getattr(item, "callspec", None)
    return str(case.params.get("family", "")) if case else ""


def _of_families(items: list[pytest.Item], most: int) -> set[int]:
    """The tests of some families of each, evenly spread, and all that have none."""
    found: dict[str, list[str]] = defaultdict(list)
    for item in items:
        name, family = item.nodeid.partition("[")[0], _family(item)
        if family and family not in found[name]:
            found[name].append(family)
    kept = {
        name: {
            own[(i + 1) * len(own) // min(most, len(own)) - 1] for i in range(min(most, len(own)))
        }
        for name, own in found.items()
    }
    return {
        id(item)
        for item in items
        if not _family(item) or _family(item) in kept[item.nodeid.partition("[")[0]]
    }


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
