"""lm-eval's tasks with a compressed cache: a model for its registry, named `kvpress`.

Continuations are scored from a compressed context, which one plain forward pass would never use:
the context is read once, compressed, and asked about each of them. The question stands in the
context there (protocol: visible). Generation goes through the engine as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from kvpress.bench.common.models import DEMO, Source
from kvpress.bench.quality.metrics import score
from kvpress.bench.quality.sample import Question
from kvpress.bench.quality.system import LocalSystem
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm


@dataclass
class Ledger:
    """Bytes of all caches since it was cleared, and the tokens of the longest sequence."""

    bytes_held: int = 0
    bytes_full: int = 0
    longest: int = 0

    def clear(self) -> None:
        """Counts from zero again."""
        self.bytes_held = self.bytes_full = self.longest = 0

    def add(self, cache: Any, more: int = 0) -> None:
        """Counts a cache. more: tokens that were asked about besides."""
        report = cache.report()
        self.bytes_held += report.bytes_held
        self.bytes_full += report.bytes_full
        self.longest = max(self.longest, max(report.tokens_seen, default=0) + more)

    @property
    def fields(self) -> dict[str, int]:
        """As they stand in a cell."""
        return dict(vars(self))


Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context, continuation


@register_model("kvpress")
class KVPressLM(HFLM):
    """A model with a policy.

    Args: pretrained: 'demo', a Hugging Face id, a path, or a loaded model with its `tokenizer`.
    policy: `name:key=value`; options are joined with `;` where commas part the arguments. Other
    arguments are those of lm-eval's HFLM.
    """

    def __init__(
        self,
        pretrained: Any = DEMO,
        policy: str = "full",
        tokenizer: Any = None,
        dtype: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval asks for CUDA by default, wherever it runs
        if isinstance(pretrained, str):
            others = device_map, revision, trust_remote_code
            pretrained, tokenizer = Source(pretrained, dtype, device, *others).load()
        self.ledger = Ledger()
        self.system = LocalSystem(pretrained, policy.replace(";", ","))
        super().__init__(pretrained=self.system.model, tokenizer=tokenizer, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of every continuation, and whether greedy decoding gives it."""
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="continuations") as bar:
            for context, same in groupby(order, key=lambda i: requests[i][1]):
                cache = self.system.read(context[:-1])
                chosen = list(same)
                self.ledger.add(cache, 1 + max(len(requests[i][2]) for i in chosen))
                for i in chosen:
                    texts, _, continuation = requests[i]
                    question = Question(tuple(context[-1:]), tuple(continuation))
                    made = score(self.system.ask(cache, question), continuation)
                    answers[i] = (-made.nll * len(continuation), bool(made.exact))
                    self.cache_hook.add_partial("loglikelihood", texts, answers[i])
                    bar.update()
        return [answers[i] for i in range(len(requests))]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        """Answers decoded with a cache of our own, whose bytes are counted at their end."""
        cache, name = self.system.generating(max_length - context.shape[1])
        made: torch.Tensor = super()._model_generate(
            context, max_length, stop, **options, **{name: cache}
        )
        self.ledger.add(cache)
        return made


if __name__ == "__main__":  # lm-eval's own command line, which then knows the model
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
