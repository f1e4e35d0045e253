"""Know what to read before the forward pass (SpeContext, Xu et al., arXiv 2512.00722).

1. A light retrieval head, of which embedding, query and key projection are left, attends to all
   tokens before layer 0 of a decode step; it keeps a key cache of its own.
2. Query heads that share a KV head share what they look at: the largest softmax score of them
   (section 4). One selection per KV head holds for all layers.
3. So the loads of all layers are known at once, and are under way while layers are computed; what
   the last step read stays where it is, only the difference is loaded.
4. New tokens join the head's keys. Prompts are read exactly.

Differs from the paper: whole pages are read, those on which the head's attention comes to most; the
paper gathers single tokens. Where the head sees less than `sure` of its own attention in what it
chose, a row chooses by the boxes of its pages for this step, as `quest` does: what the authors name
as future work. The head is not that of EAGLE-3 unless its checkpoint is given: `distilled` is
trained by `kvpress distill` against the attention of the model, `self` is the model's own layer 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvpress.policy import Budget, Policy, Retrieval, option


@dataclass(frozen=True, kw_only=True)
class SpeContext(Policy):
    read: Budget = option(1024, "tokens a row reads per step, at most: a number, or a fraction")
    head: str = option(
        "distilled", "who looks first: distilled, self, or a file of kvpress distill or EAGLE-3"
    )
    sure: float = option(
        0.5, "least share of the head's attention in what it chose; below: by boxes", low=0, high=1
    )
    page: int | None = option(
        None, "tokens of a page, 32·n; none: 32, of more than 64 channels 64", low=32, high=1024
    )
    sink: int = option(4, "first tokens that are always read", low=0)
    recent: int = option(64, "last tokens that are always read", low=0)
    dense: int = option(0, "first layers that read everything", low=0, layers=True)

    def retrieve(self, layer: int) -> Retrieval | None:
        if layer < self.dense:
            return None
        return Retrieval(
            self.read,
            self.page,
            sink=self.sink,
            recent=self.recent,
            head=self.head,
            sure=self.sure,
        )
