"""NVIDIA's kvpress in a process and an environment of its own, asked by lines of JSON.

It shares its import name with this project: the file is run by its path, and imports nothing of
this project but the count of bytes and what finds positions. Requests and replies are lines; logits
go through safetensors files. Seconds are taken here, so that no exchange is timed.
"""

from __future__ import annotations

import ast
import copy
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

import kvpress

sys.path.append(str(Path(__file__).parents[1] / "common"))  # last: it must hide nothing
from answers import answer
from kept import NotingCache, positions
from storages import storage_bytes


def make_press(spec: str) -> Any:
    """A press from `Class:option=value,…` or `Outer(Inner):option=value,…`.

    budget: the fraction kept, which becomes what the press calls its ratio of compression.
    """
    head, _, tail = spec.partition(":")
    match = re.fullmatch(r"(\w+)(?:\((\w+)\))?", head)
    names = [name for name in (match.groups() if match else ()) if name]
    unknown = [name for name in names if not hasattr(kvpress, name)] if names else [head]
    if unknown:
        known = sorted(name for name in dir(kvpress) if name.endswith("Press"))
        raise ValueError(f"There is no press {unknown[0]!r}. Allowed: {', '.join(known)}.")
    options = dict(item.split("=") for item in tail.split(",") if item)
    budget = float(options.pop("budget", 1))
    values = {key: ast.literal_eval(value) for key, value in options.items()}
    inner = getattr(kvpress, names[-1])
    fields = inner.__dataclass_fields__
    ratio = next(f for f in ("compression_ratio", "key_channel_compression_ratio") if f in fields)
    press = inner(**{ratio: 1 - budget}, **values)
    return press if len(names) == 1 else getattr(kvpress, names[0])(press)


class Peer:
    """A model with a press. What it is asked to do are its methods."""

    def __init__(
        self, model: str, dtype: str, device: str, threads: int, press: str, hub: dict[str, Any]
    ) -> None:
        torch.set_num_threads(threads)
        self._press = make_press(press)
        # A press that needs the attention weights gets them only from the eager implementation.
        eager = "ObservedAttention" in press
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype),
            attn_implementation="eager" if eager else "sdpa",
            **hub,
        )
        self._model = loaded.to(device).eval()
        self._layers = [layer.self_attn for layer in self._model.model.layers]
        self._cache: Any = None
        self._seen = 0

    def use(self, press: str) -> dict[str, Any]:
        """Compresses with another press from now on."""
        self._press = make_press(press)
        return {}

    def kept(self, tokens: list[int]) -> dict[str, Any]:
        """Reads a prompt; the positions that it then holds, by layer and KV head."""
        cache = NotingCache()
        self.read([tokens], cache)
        found = [
            positions(cache.first[i][0], cache.layers[i].keys[0], self._masked(layer))
            for i, layer in enumerate(self._layers)
        ]
        return {"positions": found}

    def read(self, tokens: list[list[int]], cache: Any = None) -> dict[str, Any]:
        """Reads prompts of equal length into an empty cache, compressed."""
        ids = self._ids(tokens)
        cache = DynamicCache() if cache is None else cache
        start = self._clock()
        with self._press(self._model):
            self._model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        taken = self._clock() - start
        self._cache, self._seen = cache, ids.shape[1]
        return {"seconds": taken, "bytes": self._bytes()}

    def step(self, tokens: list[list[int]]) -> dict[str, Any]:
        """One decode step of all sequences."""
        ids = self._ids(tokens)
        start = self._clock()
        self._forward(ids, self._cache, self._seen, 1)
        taken = self._clock() - start
        self._seen += 1
        return {"seconds": taken, "bytes": self._bytes()}

    def ask(
        self, prompt: list[int], answer: list[int], stepwise: bool, file: str
    ) -> dict[str, Any]:
        """The logits before each token of the answer, in a file; the cache stays as it was."""
        cache = copy.deepcopy(self._cache)
        given = self._ids([[*prompt, *answer[:-1]]])
        if not stepwise:
            logits = self._forward(given, cache, self._seen, len(answer))
        else:
            steps = [self._forward(given[:, : len(prompt)], cache, self._seen, 1)]
            for i in range(len(prompt), given.shape[1]):
                steps.append(self._forward(given[:, i : i + 1], cache, self._seen + i, 1))
            logits = torch.cat(steps)
        save_file({"logits": logits.float().cpu().contiguous()}, file)
        return {}

    def _forward(self, ids: torch.Tensor, cache: Any, seen: int, keep: int) -> torch.Tensor:
        """Logits `[keep, V]`. Positions are given: an evicted cache does not know its length."""
        positions = torch.arange(seen, seen + ids.shape[1], device=ids.device)[None]
        out = self._model(
            ids,
            past_key_values=cache,
            position_ids=positions.expand(len(ids), -1),
            logits_to_keep=keep,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _bytes(self) -> int:
        """Of the cache, and of the indices of masked keys that some presses leave on the layers."""
        return int(storage_bytes([self._cache, [self._masked(layer) for layer in self._layers]]))

    @staticmethod
    def _masked(layer: Any) -> Any:
        return getattr(layer, "masked_key_indices", None)

    def _ids(self, tokens: list[list[int]]) -> torch.Tensor:
        return torch.tensor(tokens, device=self._model.device)

    def _clock(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    """Answers until standard input ends. The first request makes the model."""
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    made: list[Peer] = []

    def reply_to(request: dict[str, Any]) -> dict[str, Any]:
        if made:
            reply: dict[str, Any] = getattr(made[0], request.pop("do"))(**request)
            return reply
        made.append(Peer(**request))
        return {}

    answer(reply_to)


if __name__ == "__main__":
    main()
