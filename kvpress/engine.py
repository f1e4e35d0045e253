"""The engine: a policy attached to a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from kvpress import calibration, saving
from kvpress.attachment import Attachment, cache_name, check_model
from kvpress.cache import EngineCache, Lease
from kvpress.errors import AttachError, CacheError, PolicyError
from kvpress.identity import Identity
from kvpress.loading import parse
from kvpress.meter import Report
from kvpress.policy import Policy, Recipe
from kvpress.portions import check_portions
from kvpress.rotary import Rotation, rotations
from kvpress.shapes import FLOATS

PAGE_SLOTS = 16


def attach(
    model: Any,
    policy: str | Policy | Recipe | Sequence[str | Policy],
    *,
    page_size: int = PAGE_SLOTS,
    cache_dtype: torch.dtype | None = None,
) -> Engine:
    """Attaches a policy to a transformers model; the engine is also a context manager.

    policy: `"name:budget=0.5"`, a Policy, or several joined with `+` or in a list. page_size: slots
    per page. cache_dtype: float32, bfloat16 or float16 for stored keys and values whatever the
    model computes in; None: the model's. Every `generate()` or forward call of the model then uses
    a compressed cache until `engine.detach()` or the end of the `with` block. Raises PolicyError,
    BudgetError, AttachError or UnsupportedModelError; the model is then untouched.
    """
    return Engine(model, parse(policy), page_size, cache_dtype)


class Engine:
    """A policy attached to a model. Made by `attach`."""

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        page_size: int,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(page_size, int) or not 1 <= page_size <= 4096:
            raise PolicyError(
                f"page_size={page_size!r} must be a whole number of slots from 1 to 4096."
            )
        if cache_dtype is not None and cache_dtype not in FLOATS:
            raise PolicyError(
                f"cache_dtype={cache_dtype} is not supported. Allowed: torch.float32,"
                " torch.bfloat16, torch.float16, or None for the model's own."
            )
        self.model, self.recipe, self._page_slots = model, recipe, page_size
        self._cache_dtype = cache_dtype
        self._cache: EngineCache | None = None
        self._lease = Lease(weights=Identity(model))
        self.fingerprint = check_model(model)
        check_portions(recipe, sum(kind.window is None for kind in self.fingerprint.kinds))
        if recipe.formats and any(kind.slopes for kind in self.fingerprint.kinds):
            raise PolicyError(
                f"{recipe}: keys of this model carry ALiBi positions in channels, which"
                " must not be pruned or quantised. Use a policy that keeps keys as they are."
            )
        turns = recipe.needs_rotation
        self._rotations: list[Rotation | None] = rotations(model) if turns else []
        self._thresholds = calibration.thresholds(recipe.sparsity, model, self.fingerprint)
        self._attachment: Attachment | None = Attachment(model, self.new_cache, self._lease)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    @property
    def attached(self) -> bool:
        """Whether the model currently uses this engine."""
        return self._attachment is not None

    def detach(self) -> None:
        """Puts the model back as it was.

        The last cache stays readable; calling it twice is harmless.
        """
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
            self._lease.active = False

    def new_cache(self, max_new_tokens: int | None = None) -> EngineCache:
        """An empty cache for transformers' `cache` (`past_key_values` before 5.24).

        max_new_tokens: what schedules of a policy should expect.
        """
        cache = self._make_cache(max_new_tokens)
        self._cache = cache  # what is returned stays this call's own when threads share an engine
        return cache

    def _make_cache(self, max_new_tokens: int | None = None) -> EngineCache:
        return EngineCache(
            self.fingerprint,
            self.recipe,
            self._page_slots,
            max_new_tokens,
            self._lease,
            self._cache_dtype,
            self._rotations,
            self._thresholds,
        )

    def load_cache(self, path: str | Path) -> EngineCache:
        """The cache that `cache.save(path)` wrote, to go on exactly where it was.

        The file is checked byte by byte. Raises CacheFileError if it is not whole, or comes from
        another model, other weights, another policy or another version of the engine.
        """
        cache = self._make_cache()
        cache.load(path, saving.layer_devices(self.model))
        self._cache = cache
        return cache

    @property
    def cache(self) -> EngineCache:
        """The newest cache of this engine. Raises AttachError before the first call."""
        if self._cache is None:
            raise AttachError(
                "No cache yet: run generate() or a forward pass of the attached model first."
            )
        return self._cache

    def generate(
        self,
        *args: Any,
        cache: EngineCache | None = None,
        past_key_values: EngineCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """`model.generate(...)` with a compressed cache; takes and returns what transformers does.

        Pass the cache of an earlier call as `cache`, or by its older name, to go on from there.
        """
        if self._attachment is None:
            raise AttachError(
                "The engine is detached. Attach it again: kvpress.attach(model, policy)."
            )
        if cache is None:
            cache = self.new_cache() if past_key_values is None else past_key_values
        if not isinstance(cache, EngineCache):
            raise CacheError(
                f"engine.generate() continues from caches made by engine.new_cache(), got "
                f"{type(cache).__name__}. Leave the cache out to start a new one."
            )
        if not kwargs.setdefault("use_cache", True):  # the default of some models is False
            raise CacheError(
                "engine.generate(use_cache=False): it exists to use a cache. Leave the option out,"
                " or call model.generate()."
            )
        config = kwargs.get("generation_config") or self.model.generation_config
        expected = kwargs.get("max_new_tokens") or config.max_new_tokens
        if expected is not None:
            cache.expect(expected)
        cache.stop_past_recording()  # speculative decoding starts it again
        self._cache = cache
        out = self.model.generate(*args, **{cache_name(self.model): cache}, **kwargs)
        cache.stop_past_recording()  # tokens that are still drafted were accepted
        return out

    def report(self, cache: EngineCache | None = None) -> Report:
        """The ledger of a cache, by default the newest: slots, bytes, seconds per stage, notes."""
        name = getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
        return (cache or self.cache).report(name)
