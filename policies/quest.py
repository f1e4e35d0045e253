"""Read only the pages whose keys can matter to the query (Quest, Tang et al., arXiv 2406.10774).

1. Of every page of stored slots the least and the largest key of each channel are kept (Sec. 3.2).
2. A page's score is Σ_d max(q_d · min_d, q_d · max_d): no key of it has a larger product with q.
   The best ones are judged again by which part of that box each of their keys is in (`cells`).
3. A decode step attends to the pages with the largest scores, `read` tokens per row; all are kept.
4. The first `dense` layers read everything. Prompts are attended to in full.

Differs from the paper: cells are ours, `cells=0` does without; pages hold 32 tokens, 64 where heads
are wide (16); query heads that share a KV head share its pages, ranked by the largest score
relative to the best one of each head; tokens that fill no page yet, the first and the last ones are
always read. `mass` reads until no query head can miss more of its attention, `top` until the
largest logits of every query head are known: those modes are ours. `guess` is InfiniGen's (arXiv
2406.19707), of which it takes when pages are loaded, not what is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpress.policy import Budget, Policy, Retrieval, option


@dataclass(frozen=True, kw_only=True)
class Quest(Policy):
    read: Budget = option(1024, "tokens a row reads per step, at most: a number, or a fraction")
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
    dense: int = option(2, "first layers that read everything (paper: 2)", low=0, layers=True)
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
        if layer < self.dense:
            return None
        return Retrieval(
            self.read,
            self.page,
            self.cells,
            self.candidates,
            self.sink,
            self.recent,
            self.mass,
            self.top,
            guess=self.guess,
        )
