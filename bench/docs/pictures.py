"""The pictures of the README and of docs/, by the names of their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvpress.bench.docs import picture_kept, picture_life, picture_quality, picture_top

PICTURES: Mapping[str, Callable[[], str]] = {
    "top": picture_top.draw,
    "quality": picture_quality.draw,
    "kept": picture_kept.draw,
    "life": picture_life.draw,
}
