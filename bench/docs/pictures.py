"""The pictures of the README and of docs/, by the names of their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvpress.bench.docs import (
    fewer,
    picture_fewer,
    picture_heads,
    picture_kept,
    picture_life,
    picture_quality,
    picture_top,
    record_heads,
)
from kvpress.bench.docs.tables import RESULTS

PICTURES: Mapping[str, Callable[[], str]] = {
    "top": picture_top.draw,
    "quality": picture_quality.draw,
    "kept": picture_kept.draw,
    "life": picture_life.draw,
    **({"heads": picture_heads.draw} if record_heads.PATH.exists() else {}),
    **({"fewer": picture_fewer.draw} if any(RESULTS.glob(fewer.PATTERN)) else {}),
}
