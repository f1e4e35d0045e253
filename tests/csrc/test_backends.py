"""Every backend answers every schema: decode steps through the dispatcher, not kernels alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpress import ops

RECIPES = [
    "full",
    "h2o:budget=0.5",
    "d2o:budget=0.5",
    "quant:residual=4",  # whose guard keeps 8 bits for some rows, or for none
    "think:recent=4+quant:key_bits=8,value_bits=8,residual=4,guard=none,group=64",
    "tova:budget=0.9+quant:key_bits=8,value_bits=8,residual=4,guard=none,group=64",
]
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import helpers, kvpress, torch
from kvpress import ops
model, ids = helpers.tiny(initializer_range=0.3, num_hidden_layers=2), helpers.prompt(2, 72)
tokens = {"backend": ops.backends()["cpu"]}
for recipe in sys.argv[2:]:
    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache(max_new_tokens=3)
        tokens[recipe] = helpers.greedy(model, ids, torch.ones_like(ids), 3, cache).tolist()
        assert cache.check_integrity()
print(json.dumps(tokens))
"""


def tokens_of(backend: str) -> dict[str, object]:
    """What a process with this backend generates."""
    tools = str(Path(__file__).parents[1] / "tools")
    command = [sys.executable, "-c", PROGRAM, tools, *RECIPES]
    environment = {**os.environ, "KVPRESS_BACKEND": backend}
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(ops.backends()["cpu"] != "cpu", reason="no C++ compiler here")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends_generate_the_same_tokens(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    given, wanted = tokens_of(backend), tokens_of("cpu")
    assert given.pop("backend") == backend and wanted.pop("backend") == "cpu"
    assert given == wanted
