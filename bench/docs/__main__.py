"""Makes the tables and pictures of the README and of docs/ anew, or checks them with `--check`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from kvpress.bench.docs import (
    fewer,
    pictures,
    plan,
    positions,
    quality,
    reference,
    retrieval,
    retrieval_heads,
    serving,
    speed,
    stages,
    tiers,
)
from kvpress.bench.docs.marks import fill, update
from kvpress.bench.docs.tables import ROOT

PARTS: Mapping[str, Callable[[], str]] = {
    **reference.PARTS,
    **stages.PARTS,
    **quality.PARTS,
    **fewer.PARTS,
    **speed.PARTS,
    **positions.PARTS,
    **tiers.PARTS,
    **plan.PARTS,
    **retrieval.PARTS,
    **retrieval_heads.PARTS,
    **serving.PARTS,
}
PICTURES = ROOT / "docs" / "pictures"


def make(check: bool) -> list[str]:
    """The files that were not right; without `check` they are now."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wrong = [path for path in pages if not fill(path, PARTS, check)]
    drawn = {PICTURES / f"{name}.svg": draw for name, draw in pictures.PICTURES.items()}
    wrong += [path for path, draw in drawn.items() if not update(path, draw(), check)]
    return [str(path.relative_to(ROOT)) for path in wrong]


if __name__ == "__main__":
    only_check = "--check" in sys.argv[1:]
    found = make(only_check)
    if found and only_check:
        sys.exit(f"Out of date: {', '.join(found)}. Run scripts/lint.")
    sys.stdout.writelines(f"Wrote {name}.\n" for name in found)
