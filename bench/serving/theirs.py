"""transformers' own continuous batching, on a model without an engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kvpress.bench.serving.heard import Heard, Round
from kvpress.bench.serving.servers import copied, greedy, wait_until
from kvpress.bench.serving.workload import Asked

from kvpress.errors import KVPressError

PAGE = 256  # tokens of a page, its default
_PATIENCE = 60.0  # seconds until its thread is there


class TheirsError(KVPressError, RuntimeError):
    """A request that transformers did not serve."""


class Theirs:
    """A `ContinuousBatchingManager`, which lives through all rounds.

    Its cache has room for all requests at once: it never has to put one aside. Nothing is compiled
    and no graphs are made, as for the others. batch_tokens: of a pass.
    """

    def __init__(self, model: Any, asked: Sequence[Asked], batch_tokens: int) -> None:
        from transformers import ContinuousBatchingConfig

        self._model, self._rounds = copied(model), 0
        blocks = sum(-(-(len(one.ids) + one.new_tokens) // PAGE) for one in asked)
        self._manager: Any = self._model.init_continuous_batching(
            greedy(eos_token_id=-1),
            ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=blocks + 1,
                max_batch_tokens=batch_tokens,
                max_requests_per_batch=len(asked),
                allow_block_sharing=False,
                use_cuda_graph=False,
            ),
        )
        self._manager.start()
        limit = time.monotonic() + _PATIENCE
        while self._manager.batch_processor is None and time.monotonic() < limit:
            time.sleep(0.01)

    def serve(self, asked: Sequence[Asked]) -> Round:
        """See `Server`."""
        self._rounds += 1
        start, heard = time.perf_counter(), {}
        for number, one in enumerate(asked):
            own = Heard(start + one.at)
            wait_until(own.arrived)
            name = f"{self._rounds}-{number}"
            heard[name] = own
            self._manager.add_request(
                list(one.ids),
                request_id=name,
                max_new_tokens=one.new_tokens,
                record_timestamps=True,
                eos_token_id=-1,
            )
        for _ in asked:
            self._collect(heard)
        return Round(list(heard.values()), self._reserved)

    def _collect(self, heard: dict[str, Heard]) -> None:
        """Takes the next request that is over. Raises TheirsError."""
        found = None
        while found is None:
            found = self._manager.get_result(timeout=1.0)
            if found is None and not self._manager.is_running():
                raise TheirsError("transformers' batching has stopped before all were served.")
        if found.error is not None:
            raise TheirsError(f"transformers' batching failed: {found.error}")
        own = heard[found.request_id]
        own.begun = found.lifespan[0]
        own.tokens, own.times = list(found.generated_tokens), list(found.timestamps)

    @property
    def _reserved(self) -> int:
        """Bytes of its paged cache, which it takes at its start."""
        return int(self._manager.batch_processor.cache.cache_tensor.nbytes)

    def close(self) -> None:
        """See `Server`."""
        self._manager.stop(block=True)
