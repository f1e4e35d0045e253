"""How many bytes each tier may have, as users say it."""

from __future__ import annotations

from dataclasses import dataclass

from kvpress.errors import TierError
from kvpress.formulas.sizes import UNITS, parse_size
from kvpress.store.tiers.folder import DiskSpec


@dataclass(frozen=True)
class Caps:
    """The most that tiers may hold, in bytes. disk: and in which folder; None: there is none."""

    device: int
    host: int = 0
    disk: DiskSpec | None = None

    @classmethod
    def parse(
        cls, device: str | int | None, host: str | int | None, disk: str | None
    ) -> Caps | None:
        """The caps that `attach` was given; None: there are none. Raises TierError."""
        if device is None and host is None and disk is None:
            return None
        if device is None:
            raise TierError(
                f"host={host!r}, disk={disk!r} without device=: what the device may hold decides"
                ' what goes to the other tiers. Give it too, for example device="512MiB".'
            )
        file = None if disk is None else DiskSpec.parse(str(disk))
        return cls(_size("device", device), 0 if host is None else _size("host", host), file)


def _size(name: str, given: str | int) -> int:
    """Bytes from `512MiB` or a number. Raises TierError."""
    whole = isinstance(given, int) and not isinstance(given, bool)
    size = given if isinstance(given, int) and whole else parse_size(str(given))
    if size is None or size < 0:
        raise TierError(
            f"{name}={given!r} is no size. Allowed: a number of bytes, or one with a unit"
            f" ({', '.join(UNITS)}, in any case), as in 512MiB."
        )
    return size
