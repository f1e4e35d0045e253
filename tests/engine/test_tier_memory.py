"""Memory of a process that decodes on small tiers stays flat, and nothing is left in the folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiers

TOKENS, FEWER = 2000, 500  # fewer where not all cases are run
CODE = """
import gc, json, os, sys
sys.path.insert(0, sys.argv[1])
import helpers, tiered, torch, kvpress

torch.set_num_threads(1)

def figures(engine):
    tiers = engine.spec.tiers
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    files = [os.fstat(fd).st_size for fd in (tiers.vault._parts.disk.fd,)]
    pools = [arena.memory_X.numel() for arena in tiers._arenas.values()]
    return {"resident": resident, "files": files, "pools": pools,
            "host": tiers.vault.capacity_host, "threads": len(tiered.threads())}

model = tiered.model(2, 1, 32, num_hidden_layers=2, max_position_embeddings=4096)
found = []
with kvpress.attach(model, "full", **tiered.caps("both", model, "full", 1, sys.argv[2])) as engine:
    with torch.inference_mode():
        cache = engine.new_cache()
        logits = model(helpers.prompt(1, 600), past_key_values=cache).logits
        for step in range(int(sys.argv[3])):
            token = logits[:, -1:].argmax(-1)
            logits = model(token, past_key_values=cache).logits
            if step in (int(sys.argv[3]) // 4, int(sys.argv[3]) - 1):
                gc.collect()
                found.append(figures(engine))
    found[-1]["below"] = tiered.below(cache)
    tiered.check(engine, cache)
    print(json.dumps(found), flush=True)
    sys.stdin.readline()
"""


def decoded(folder: Path, tokens: int, end: str) -> list[dict[str, Any]]:
    """What a process says that then ends, by itself or killed."""
    tools = str(Path(__file__).parents[1] / "tools")
    command, pipe = [sys.executable, "-c", CODE, tools, str(folder), str(tokens)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert tiers.left(folder) == ["kvpress.lock"]
        if end == "kill":
            process.kill()
        process.communicate("\n")
        assert process.returncode == (-signal.SIGKILL if end == "kill" else 0)
    return json.loads(line)


def test_memory_is_flat(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    all_cases = request.config.getoption("--cases") is None
    early, late = decoded(tmp_path, TOKENS if all_cases else FEWER, "exit")
    assert late.pop("below") > 0
    assert late.pop("resident") < 1.05 * early.pop("resident")
    assert early == late
    assert tiers.left(tmp_path) == []


def test_a_process_that_is_killed_leaves_no_bytes(tmp_path: Path) -> None:
    decoded(tmp_path, 8, "kill")
    assert set(tiers.left(tmp_path)) <= {"kvpress.lock"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 100
    tiers.close(tiers.vault(tmp_path))  # taken over
    assert tiers.left(tmp_path) == []


@pytest.fixture(autouse=True)
def _linux() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc")
