"""Prints by how many bytes a process grows while a session is saved, loaded lazily, and at once."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filling
import torch

TOKENS = 24 * 1024  # of 4 KiB


def resident(what: str) -> int:
    """VmRSS now, or VmHWM since it was cleared, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status).group(1)) << 10


def grown(do: Callable[[], Any]) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    kept = do()
    after = resident("VmHWM") - before
    del kept
    return after


def main(folder: Path) -> None:
    (folder / "tier").mkdir()
    chat, query = folder / "chat", torch.randn(1, filling.HEADS, 1, filling.WIDTH).bfloat16()
    caps = {"device": "8MiB", "host": "8MiB", "disk": f"128MiB:{folder / 'tier'}"}
    engine = filling.attached(**caps)
    filling.fill(engine.new_cache(), TOKENS, filling.drawn())
    expected = filling.attend(engine.cache, query)
    saved = grown(lambda: engine.cache.save(chat))
    engine.newest.__init__()
    gc.collect()
    engine.spec.tiers.collect()

    def answered(lazy: bool) -> Any:
        loaded = engine.load_cache(chat, lazy=lazy)
        assert torch.equal(filling.attend(loaded, query), expected)
        return loaded

    lazily = grown(lambda: answered(True))
    gc.collect()
    print(saved, lazily, grown(lambda: answered(False)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
