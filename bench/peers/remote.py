"""A peer in another process, as a system of the evaluation and a candidate of the benchmarks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kvpress.bench.common import models
from kvpress.bench.common.demo import demo_folder
from kvpress.bench.common.journal import Row
from kvpress.bench.common.lines import Other, OtherError
from kvpress.bench.common.timing import Samples
from kvpress.bench.quality.sample import Question
from kvpress.bench.quality.system import Held
from kvpress.bench.speed.setting import Setting
from safetensors.torch import load_file
from torch import Tensor

PREFIX = "nvidia/"  # of the names of its presses
_CHILD = Path(__file__).with_name("child.py")


class PeerError(OtherError):
    """A peer that is not installed, or that failed."""


def environment() -> Path:
    """The Python of the peer's environment. Raises PeerError where there is none."""
    given = os.environ.get("KVPRESS_PEERS")
    folder = Path(given) if given else Path(__file__).parents[2] / ".venv-peers"
    python = folder / "bin" / "python"
    if not python.exists():
        raise PeerError(
            f"There is no environment of peers at {folder}. Make it with scripts/peers, or name one"
            " in KVPRESS_PEERS."
        )
    return python


class Peer:
    """NVIDIA's kvpress with one press: `nvidia/SnapKVPress:budget=0.5`.

    A system of the evaluation. It keeps one cache at a time: the one that was read last.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name
        self._other = Other(name, [str(environment()), str(_CHILD)], error=PeerError)
        folder = demo_folder() if setting.model == models.DEMO else setting.model
        try:
            self.request(
                model=str(folder),
                dtype=setting.dtype,
                device=setting.device,
                threads=setting.threads,
                hub=setting.source.hub,
                press=name.removeprefix(PREFIX),
            )
        except PeerError:
            self.close()
            raise

    def request(self, **what: Any) -> dict[str, Any]:
        """The reply to a request. Raises PeerError."""
        return self._other.request(**what)

    def use(self, name: str) -> None:
        """Compresses with another press from now on, in the same process. Raises PeerError."""
        self.request(do="use", press=name.removeprefix(PREFIX))
        self.name = self._other.name = name

    def kept(self, tokens: Sequence[int]) -> list[list[list[int]]]:
        """The positions that it holds of a prompt, by layer and KV head."""
        found: list[list[list[int]]] = self.request(do="kept", tokens=list(tokens))["positions"]
        return found

    def close(self) -> None:
        """Ends the process."""
        self._other.close()

    def read(
        self, tokens: Sequence[int], calls: Sequence[Any] = (), protect: Sequence[Any] = ()
    ) -> int:
        """Reads a context; the bytes that it then holds. The rest is of no use to it."""
        return int(self.request(do="read", tokens=[list(tokens)])["bytes"])

    def ask(self, cache: int, question: Question, stepwise: bool = False) -> Tensor:
        """The logits before each token of the answer, `[T, Y]`."""
        file = str(self._other.file("logits.safetensors"))
        prompt, answer = list(question.prompt), list(question.answer)
        self.request(do="ask", prompt=prompt, answer=answer, stepwise=stepwise, file=file)
        return load_file(file)["logits"]

    def decode(self, cache: int, prompt: Sequence[int], most: int) -> list[int]:
        """Raises PeerError."""
        raise PeerError(f"{self.name} answers by teacher forcing only. Leave out --generate.")

    def bytes(self, cache: int) -> Held:
        """Bytes held; what the full cache would hold is not known here."""
        return Held(cache, 0)

    def step_reads(self, cache: int) -> None:
        """All that is held."""


class PeerMeasurement:
    """What a peer does in `decode` or `prefill`; seconds are those of its own clock."""

    def __init__(self, bench: str, peer: Peer, ids: torch.Tensor, batch: int, weights: int) -> None:
        self._bench, self._peer, self._weights = bench, peer, weights
        prompts = ids[:1].repeat(batch, 1) if bench == "decode" else ids[:batch]
        self._prompts: list[list[int]] = prompts.tolist()
        self._seconds: list[float] = []
        self._reply: dict[str, Any] = {}
        if bench == "decode":
            self._reply = peer.request(do="read", tokens=self._prompts)

    def round(self, number: int) -> None:
        """Reads the prompts, or decodes one token."""
        if self._bench == "prefill":
            self._reply = self._peer.request(do="read", tokens=self._prompts)
        else:
            last = [prompt[-1:] for prompt in self._prompts]
            self._reply = self._peer.request(do="step", tokens=last)

    def settle(self, timed: bool) -> None:
        """Notes the seconds of the round."""
        if timed:
            self._seconds.append(self._reply["seconds"])

    def row(self, taken: Samples) -> Row:
        """As of the benchmark's other candidates, as far as it is known."""
        taken_there = Samples(self._seconds)
        batch, tokens = len(self._prompts), len(self._prompts[0])
        done = batch * tokens if self._bench == "prefill" else batch
        unknown: Row = {"stages": {}} if self._bench == "prefill" else {"attention": None}
        return {
            **unknown,
            "seconds": taken_there.to_dict(),
            "tokens_per_second": done / taken_there.median,
            "bytes_held": self._reply["bytes"],
            "bytes_weights": self._weights,
        }
