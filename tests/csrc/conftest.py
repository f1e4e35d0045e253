"""What every test of an operator leaves as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The number of threads: some tests compare several."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)
