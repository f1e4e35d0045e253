"""A chat in a file: what it holds is not read again, and what comes goes on from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpress.bench.common.prompt import as_chat, as_turn

if TYPE_CHECKING:
    import torch

    from kvpress.engine import Engine
    from kvpress.hf.cache import EngineCache


@dataclass(frozen=True)
class Session:
    """Where a chat is saved. chat: whether turns are written in the tokenizer's chat template."""

    path: Path
    chat: bool = True

    @property
    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return self.path.expanduser().exists()

    def resume(self, engine: Engine) -> EngineCache | None:
        """The cache of the file; None without one. Raises the engine's errors.

        With lower tiers its pages are read as they are wanted.
        """
        tiers = engine.spec.tiers
        lazy = tiers is not None and tiers.vault is not None
        return engine.load_cache(self.path, lazy=lazy) if self.exists else None

    def ids(self, tokenizer: Any, text: str, cache: EngineCache | None) -> torch.Tensor:
        """The whole text, `[1, T]`: what the cache has seen, and a turn of the user behind it."""
        import torch

        if cache is None:
            first = as_chat(tokenizer, text) if self.chat else text
            return torch.tensor([tokenizer(first)["input_ids"]])
        seen = cache.ids.all()[0].tolist()
        closing, turn = as_turn(tokenizer, text) if self.chat else ("", text)
        ends, new = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (closing, turn))
        # The answer may end with what closes it, or with a part of that.
        said = next(n for n in range(len(ends), -1, -1) if seen[len(seen) - n :] == ends[:n])
        return torch.tensor([[*seen, *ends[said:], *new]])

    def save(self, engine: Engine, cache: EngineCache, out: torch.Tensor) -> None:
        """Saves a chat, after the cache has read the last token of the answer `out`, `[1, T]`."""
        unseen = out[:, cache.get_seq_length() :]
        if unseen.shape[1]:
            engine.model(unseen, past_key_values=cache)
        cache.save(self.path)
