"""What each replica loads, in its own process."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpress.bench.common.models import Source
from kvpress.bench.common.options import use_threads

if TYPE_CHECKING:
    from kvpress.batching.batcher import Batcher


@dataclass(frozen=True)
class Plan:
    """A model, a policy, and the options of a batcher; all of them can be sent.

    threads: of the CPU; None: torch's choice. folder: the name of this replica's own folder for
    what waits on disk, in that of the option `disk`; it is emptied before and removed after.
    """

    source: Source
    policy: str
    options: dict[str, Any]
    threads: int | None = None
    folder: str = ""

    def load(self) -> tuple[Batcher, Any]:
        """The batcher and the tokenizer. Raises what loading a model and `Batcher` raise."""
        from kvpress.batching.batcher import Batcher

        use_threads(self.threads)
        given = {name: value for name, value in self.options.items() if value is not None}
        if "disk" in given and self.folder:
            given["disk"] = self._own_disk(given["disk"])
        model, tokenizer = self.source.load()
        return Batcher(model, self.policy, tokenizer=tokenizer, **given), tokenizer

    def _own_disk(self, disk: str) -> str:
        """The option with a folder of its own: one that was killed may have left files in it."""
        size, _, place = disk.partition(":")
        own = Path(place.strip()).expanduser() / self.folder
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(mode=0o700)
        return f"{size}:{own}"

    def clean(self) -> None:
        """Removes the folder."""
        disk = self.options.get("disk")
        if disk and self.folder:
            place = Path(disk.partition(":")[2].strip()).expanduser()
            shutil.rmtree(place / self.folder, ignore_errors=True)

    def of(self, number: int, run: str) -> Plan:
        """The same for one replica. run: a name that no other server uses."""
        return replace(self, folder=f"kvpress-{run}-{number}")
