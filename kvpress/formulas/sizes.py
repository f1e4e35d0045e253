"""Sizes in bytes, as they are written: a number with a unit."""

from __future__ import annotations

import re
from fractions import Fraction

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int | None:
    """The bytes that `512MiB` or `1.5GB` are, rounded down; None for what is no size."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)", text.strip())
    unit = UNITS.get(match.group(2).upper()) if match else None
    return int(Fraction(match.group(1)) * unit) if match and unit else None


def round_up(size: int, unit: int) -> int:
    """The smallest multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


def readable(count: int) -> str:
    """Bytes for people, rounded up, so that what is said is enough: `1537MiB`, `2.50GiB`."""
    if count < 2**30:
        return f"{-(-count // 2**20)}MiB"
    hundredths = -(-count * 100 // 2**30)
    return f"{hundredths // 100}.{hundredths % 100:02}GiB"
