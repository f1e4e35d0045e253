"""Who takes part in a comparison with others."""

from __future__ import annotations

from typing import Any

import torch
from kvpress.bench.common.candidates import weight_bytes
from kvpress.bench.peers.remote import PREFIX, Peer, PeerMeasurement
from kvpress.bench.quality.system import System
from kvpress.bench.speed import benches
from kvpress.bench.speed.rounds import Measurement
from kvpress.bench.speed.rows import Cell
from kvpress.bench.speed.setting import Setting


class CandidatesWithPeers(benches.LocalCandidates):
    """Candidates of this process, and peers in processes of their own, started when needed."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._peers: dict[str, Peer] = {}

    def measurement(
        self, setting: Setting, model: Any, ids: torch.Tensor, cell: Cell, name: str
    ) -> Measurement:
        """One that is timed."""
        if name.startswith(PREFIX):
            peer = self._peer(name)
            return PeerMeasurement(cell.bench, peer, ids, cell.batch, weight_bytes(model))
        return super().measurement(setting, model, ids, cell, name)

    def system(self, model: Any, name: str) -> System:
        """One that answers questions about contexts."""
        return self._peer(name) if name.startswith(PREFIX) else super().system(model, name)

    def close(self) -> None:
        """Ends the processes."""
        for peer in self._peers.values():
            peer.close()

    def _peer(self, name: str) -> Peer:
        if name not in self._peers:
            self._peers[name] = Peer(name, self._setting)
        return self._peers[name]
