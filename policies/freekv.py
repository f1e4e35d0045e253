"""Choose pages by the query of the step before, and correct it (FreeKV, arXiv 2505.13109).

1. Queries of neighbouring steps are alike: the pages that the last query asks for are known before
   the layer is computed, so that they can be on their way meanwhile.
2. Where the queries of a row have turned, a cosine below `turn` on average over its query heads,
   its pages are chosen by the query of now.
3. A step attends to `read` tokens per row, by whole pages; all are kept.

Differs from the paper: pages are judged by bounds, as `quest` does; the paper's mean over the query
heads of softmax scores is our largest bound relative to the best one of each head. With caps, what
was chosen for the next step is loaded when it is read, unless `guess=step` loads it at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpress.policy import Budget, Policy, Retrieval, option


@dataclass(frozen=True, kw_only=True)
class FreeKV(Policy):
    read: Budget = option(1024, "tokens a row reads per step, at most: a number, or a fraction")
    turn: float = option(
        0.8, "mean cosine below which a row's pages are chosen anew", low=-1, high=1
    )
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
    dense: int = option(2, "first layers that read everything", low=0, layers=True)
    guess: str | None = option(
        None, "step: the next step's pages are loaded at once; none: then", choices=["step"]
    )

    def retrieve(self, layer: int) -> Retrieval | None:
        if layer < self.dense:
            return None
        judged = (self.page, self.cells, self.candidates)
        return Retrieval(
            self.read, *judged, self.sink, self.recent, turn=self.turn, guess=self.guess
        )
