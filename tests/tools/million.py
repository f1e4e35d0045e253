"""A session of a million tokens: filled, saved, loaded lazily and attended to, timed.

    python tests/tools/million.py [--tokens 1000000] [--folder .] [--out FILE]

One layer of 8 KV heads of 128 channels in bf16, 4 GiB of keys and values, filled with those of the
real model for a text, over and over. 64 MiB of them are on the device, 128 MiB on the host, the
rest on disk. The outputs before saving and after loading must be the same bits; the error is that
against attention of plain torch in fp32. Prints seconds and resident memory of every part.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import filling
import torch
from kvpress.bench.common.environment import environment
from kvpress.bench.common.models import load
from kvpress.bench.sparse.tiled import Shape, tiles
from torch import Tensor

MIB, CHUNK = 1 << 20, 8192  # tokens that come at once
T = TypeVar("T")


class Timed:
    """What was done, with its seconds and the most resident memory meanwhile."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}

    def run(self, name: str, do: Callable[[], T]) -> T:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        begun = time.perf_counter()
        made = do()
        seconds = round(time.perf_counter() - begun, 2)
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = re.search(r"VmHWM:\s+(\d+) kB", text)
        assert peak is not None
        self.parts[name] = {"seconds": seconds, "peak_mib": int(peak.group(1)) >> 10}
        print(name, self.parts[name], flush=True)
        return made


def exact(query_1NQD: Tensor, tokens: int, make: filling.Make, piece: int = 1 << 15) -> Tensor:
    """Attention over all tokens in fp32, piece by piece."""
    query = query_1NQD.float() * filling.WIDTH**-0.5
    total = torch.full(query.shape[:3], -torch.inf)
    out = torch.zeros(query.shape)
    for first in range(0, tokens, piece):
        key, value = (x.float() for x in make(first, min(piece, tokens - first)))
        logits = query @ key.mT
        lse = logits.logsumexp(-1)
        both = torch.logaddexp(total, lse)
        part = (logits - lse[..., None]).exp() @ value
        out = out * (total - both).exp()[..., None] + part * (lse - both).exp()[..., None]
        total = both
    return out


@torch.no_grad()
def measured(tokens: int, folder: Path) -> dict[str, Any]:
    """All parts of one session."""
    shape = Shape(tokens=tokens)
    made, timed, chat = tiles(*load("demo"), shape), Timed(), folder / "chat"
    make = filling.tiled(torch.cat([made.key_1HTD, made.value_1HTD]))
    query = made.query_1NTD[:, : filling.HEADS, -1:]
    (folder / "tier").mkdir()
    disk = int(1.2 * shape.whole)  # headers, and records that are not full
    caps = {"device": "64MiB", "host": "128MiB", "disk": f"{disk}B:{folder / 'tier'}"}
    engine = timed.run("attach", lambda: filling.attached(**caps))
    timed.run("fill", lambda: filling.fill(engine.new_cache(), tokens, make, CHUNK))
    held = engine.cache.states[0].store.memory.tier_bytes()
    before = timed.run("attend", lambda: filling.attend(engine.cache, query))
    timed.run("save", lambda: engine.cache.save(chat))
    pages = sum(path.stat().st_size for path in folder.glob("chat*.pages"))
    engine.detach()
    engine.spec.tiers.close()
    del engine
    engine = filling.attached(**caps)  # another one, whose tiers are empty
    loaded = timed.run("load lazily", lambda: engine.load_cache(chat, lazy=True))
    first = timed.run("first output", lambda: filling.attend(loaded, query))
    second = timed.run("second output", lambda: filling.attend(loaded, query))
    read = engine.spec.tiers.vault.counters.from_disk.bytes
    engine.spec.tiers.close()
    reference = exact(query, tokens, make)
    error = float((first.float() - reference).abs().sum() / reference.abs().sum())
    above = {name: caps[name] for name in ("device", "host")}
    return {
        "settings": {"tokens": tokens, "caps": above},
        "mib": {
            "keys and values": shape.whole // MIB,
            **{tier: size // MIB for tier, size in held.items()},
            "manifest": chat.stat().st_size // MIB,
            "its pages": pages // MIB,
            "read back": read // MIB,
        },
        "parts": timed.parts,
        "same_bits": bool(torch.equal(first, before) and torch.equal(second, before)),
        "error": error,
        "environment": environment(torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="kvpress-million-") as own:
        text = json.dumps(measured(given.tokens, Path(own)), indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
