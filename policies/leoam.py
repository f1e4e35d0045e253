"""Read only what matters, in chunks of a size that fits (LeoAM, Sun et al., arXiv 2506.20187).

1. A chunk of tokens is judged by its abstract, the least and the largest key of each channel, which
   stays on the device wherever the chunk is: U(q) = Σ_d max(q_d · min_d, q_d · max_d).
2. Chunks form a binary tree, whose inner abstracts are the union of two others. A step begins with
   the chunks that the last one ended with and splits the best ones until the budget of whole pages
   is filled; what was not split nor chosen for 8 steps is merged again.
3. The first two layers read half of the tokens, the others a fifth (the authors' defaults).
4. Pages that are not on the device are loaded, those of the last step stay there (attach(…,
   device=, host=, disk=)).

Differs from the paper: its released program measures simulated transfers; this is the published
idea, not a port. Abstracts are of KV heads, not of all heads of a layer in one; query heads that
share a KV head share its chunks, ranked relative to the best one of each head. A tree finds the set
that a flat scan finds: only its cost differs. What it finds is judged again by the cells of keys
(`cells`), which are ours. Nothing is compressed on the way (combine with `quant`). `guess` is
InfiniGen's (arXiv 2406.19707), of which it takes when pages are loaded, not what is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpress.policy import Budget, Policy, Retrieval, option


@dataclass(frozen=True, kw_only=True)
class LeoAM(Policy):
    read: Budget = option(0.2, "tokens a row reads per step, at most: a fraction, or a number")
    early: Budget = option(0.5, "the same of the first layers")
    early_layers: int = option(2, "first layers that read more", low=0, layers=True)
    page: int | None = option(
        None, "tokens of a page, 32·n; none: 32, of more than 64 channels 64", low=32, high=1024
    )
    cells: int = option(
        2, "bits of a key's channel by which its page is judged: 2, 4; 0: only by its box"
    )
    candidates: int | None = option(
        4, "pages judged by cells, times those that may be read; none: all", low=1
    )
    sink: int = option(4, "first tokens that are always read", low=0)
    recent: int = option(64, "last tokens that are always read", low=0)
    mass: float | None = option(
        None, "share of attention that a query head may miss; none: not asked", low=0, high=1
    )
    top: int | None = option(
        None, "attend to so many tokens with the largest logits; none: to whole pages", low=1
    )
    guess: str | None = option(
        None,
        "layer: pages are loaded ahead that the layer before suggests; none: when a layer asks",
        choices=["layer"],
    )

    def retrieve(self, layer: int) -> Retrieval | None:
        read = self.early if layer < self.early_layers else self.read
        tree = self.mass is None and self.top is None
        judged = (self.page, self.cells, self.candidates)
        always, until = (self.sink, self.recent), (self.mass, self.top)
        return Retrieval(read, *judged, *always, *until, tree, guess=self.guess)
