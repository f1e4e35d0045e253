"""Where the rows of a request wait that makes room for others: on the host, then on a disk."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from pathlib import Path

from kvpress.hf.cache import EngineCache
from kvpress.hf.cache_file import Devices
from kvpress.store.sealed import Contents
from kvpress.store.tiers.caps import Caps

_FACTS_BYTES = 1 << 16  # of a file, besides tensors: more than numbers and notes take


class Parked:
    """A cache that was put aside. where: what it is held as; size: bytes of it."""

    def __init__(self, where: Contents | Path, size: int) -> None:
        self.where, self.size = where, size


class Parking:
    """Puts caches aside, exactly as they are, and takes them back.

    Files are for this user alone, in a folder of their own that is removed in the end; every byte
    of them is checked when they come back. caps: bytes of host and disk; None: nothing is put
    aside.
    """

    def __init__(self, caps: Caps | None, devices: Devices) -> None:
        self._devices = devices
        self._host = 0 if caps is None else caps.host
        self._disk = 0 if caps is None or caps.disk is None else caps.disk.bytes
        self.bytes_host = self.bytes_disk = 0
        self._folder: Path | None = None
        if caps is not None and caps.disk is not None:
            self._folder = Path(tempfile.mkdtemp(prefix="kvpress-", dir=caps.disk.folder))

    def fits(self, nbytes: int) -> bool:
        """Whether a cache that holds so many bytes can be put aside."""
        return self._on_host(nbytes) or self.bytes_disk + nbytes + _FACTS_BYTES <= self._disk

    def _on_host(self, nbytes: int) -> bool:
        return self.bytes_host + nbytes <= self._host

    def put(self, cache: EngineCache) -> Parked:
        """Puts a cache aside, which may be dropped then. Raises CacheFileError."""
        held = cache.nbytes
        if self._on_host(held) or self._folder is None:
            contents = cache.contents()
            size = sum(tensor.nbytes for tensor in contents.tensors.values())
            self.bytes_host += size
            return Parked(contents, size)
        path = self._folder / secrets.token_hex(8)
        cache.save(path)
        size = path.stat().st_size
        self.bytes_disk += size
        return Parked(path, size)

    def back(self, parked: Parked, cache: EngineCache) -> None:
        """Gives an empty cache what was put aside. Raises CacheFileError for damaged files."""
        try:
            if isinstance(parked.where, Path):
                cache.load(parked.where, self._devices)
            else:
                cache.restore(parked.where, self._devices)
        finally:
            self.drop(parked)

    def drop(self, parked: Parked) -> None:
        """Forgets what was put aside."""
        if isinstance(parked.where, Path):
            parked.where.unlink(missing_ok=True)
            self.bytes_disk -= parked.size
        else:
            self.bytes_host -= parked.size

    def close(self) -> None:
        """Removes the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
