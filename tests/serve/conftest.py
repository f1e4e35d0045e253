"""A tiny tokenizer, and a server over a batcher that draws what a script says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tools"))

from scripted import Batcher
from serving import Running, serving, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Running]:
    with serving(Batcher(tokenizer), tokenizer) as running:
        yield running
