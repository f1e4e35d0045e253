"""Triton operators in tests: on a GPU, or interpreted where there is none."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvpress.ops.registry import implementation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run(record_testsuite_property: Callable[[str, object], None]) -> Iterator[Run]:
    """Calls a Triton operator by name; memory that it does not write is NaN.

    Without a GPU the kernels are imported once more, to be interpreted, and forgotten afterwards:
    other tests see Triton as it was. A JUnit report says where they ran (`kvpress.bench.gpu`).
    """
    record_testsuite_property("triton", DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setenv("TRITON_INTERPRET", "1")
            _reload()
        yield _poisoned
    if INTERPRETED:
        _reload()


def _reload() -> None:
    for name in [n for n in sys.modules if n.startswith("kvpress.csrc.") and "triton" in n]:
        del sys.modules[name]
    for name in ("triton.language.standard", "triton.language"):
        importlib.reload(importlib.import_module(name))


def _poisoned(operator: str, *args: Any) -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        return implementation(operator, "triton_kernel")(*args)
    finally:
        torch.use_deterministic_algorithms(False)
