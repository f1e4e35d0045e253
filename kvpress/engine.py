"""The engine: a policy attached to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch

from kvpress import ops
from kvpress.errors import AttachError, CacheError, PolicyError
from kvpress.hf import cache_file, calibration, learned, planning, roles
from kvpress.hf.attach import Attachment
from kvpress.hf.cache import EngineCache
from kvpress.hf.calls import Newest
from kvpress.hf.feeding import Feeding, alone_because
from kvpress.hf.fitting import check_fit
from kvpress.hf.foresight import head_of
from kvpress.hf.identity import Identity
from kvpress.hf.norms import check_projections, output_grams
from kvpress.hf.ranks import divided, ranks_of, refuse_parts
from kvpress.hf.rotation_probe import rotations
from kvpress.hf.spec import CacheSpec, Lease
from kvpress.hf.support import check_model
from kvpress.hf.tiering import make_tiers
from kvpress.hf.unwrap import unwrap
from kvpress.hf.wording import wording
from kvpress.ops.shapes import FLOATS
from kvpress.pipe.layer_budgets import check_division
from kvpress.pipe.plan.plan import Plan
from kvpress.policy.base import Policy
from kvpress.policy.layer_counts import check_layers
from kvpress.policy.loading import parse, refuse_options
from kvpress.policy.recipe import Recipe, needs_rotation
from kvpress.report import Report
from kvpress.store.tiers.caps import Caps

PAGE_SLOTS = 16
_OPTIONS = ("page_size", "cache_dtype", "tokenizer")
_ENGINES: WeakKeyDictionary[Any, ref[Engine]] = WeakKeyDictionary()


def attach(
    model: Any,
    policy: str | Policy | Recipe | Sequence[str | Policy] | None = None,
    *,
    memory: str | int | None = None,
    length: int | None = None,
    batch: int = 1,
    new_tokens: int | None = None,
    page_size: int = PAGE_SLOTS,
    cache_dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    device: str | int | None = None,
    host: str | int | None = None,
    disk: str | None = None,
    timeout: float | None = None,
    **options: Any,
) -> Engine:
    """Attaches a policy to a transformers model; the engine is also a context manager.

    policy: `"name:budget=0.5"`, a Policy, or several joined with `+` or in a list. page_size: slots
    per page. cache_dtype: float32, bfloat16 or float16 for stored keys and values whatever the
    model computes in; None: the model's. tokenizer: for policies that read a text of their own
    behind a prompt; None: the one that was saved with the model. device, host, disk: the most that
    the keys and values of all caches of this engine may take there, `"512MiB"`, `"2GiB"`,
    `"20GiB:folder"`; what does not fit in one goes to the next, and is read back: nothing is
    forgotten. None: all of them stay on the device. memory: instead of a policy, or beside one: all
    that the process (on a GPU: the device) may hold, `"8GiB"`, weights included. Policy, budget,
    chunks of prompts and tiers are chosen for `batch` sequences of `length` tokens (None: the
    longest that the model takes), of which `new_tokens` are decoded (None: 256), as `engine.plan`
    says; what would exceed it is refused. timeout: seconds until a silent one of the processes that
    hold the model together is given up (None: KVPRESS_TIMEOUT, or 120). Every `generate()` or
    forward call of the model then uses a compressed cache until `engine.detach()` or the end of the
    `with` block. Raises PolicyError, BudgetError, PlanError, AttachError, UnsupportedModelError, or
    BackendError where an environment variable forces what cannot run; the model is then untouched.
    options: none; those of a policy belong into its specification, which the error writes out.
    """
    refuse_options(policy, options, (*_OPTIONS, "device", "host", "disk"))
    ops.refuse_settings()
    model, stored = unwrap(model), (page_size, cache_dtype)
    wanted = planning.Wanted(memory, length, batch, new_tokens, device, host, disk)
    if not wanted.plans(policy):
        caps = Caps.parse(device, host, disk)
        return Engine(model, parse(policy or ()), *stored, tokenizer, caps, timeout=timeout)
    refuse_parts(model)
    plan = planning.plan_for(model, policy, wanted, stored)
    caps = wanted.caps(plan)
    return Engine(model, parse(plan.policy), *stored, tokenizer, caps, plan)


def engine_of(model: Any) -> Engine | None:
    """The engine that is attached to a model, or to the model inside a wrapper; None: none is."""
    known = _ENGINES.get(unwrap(model))
    engine = None if known is None else known()
    return engine if engine is not None and engine.attached else None


def detach(model: Any) -> None:
    """Detaches the engine of a model, also one that nobody kept. Without one it does nothing."""
    engine = engine_of(model)
    if engine is not None:
        engine.detach()


class Engine:
    """A policy attached to a model. Made by `attach`.

    model: the transformers model, out of what wraps it. It keeps its engine alive while attached.
    plan: what was chosen for `memory=`, and why; None without.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        page_size: int,
        cache_dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        caps: Caps | None = None,
        plan: Plan | None = None,
        timeout: float | None = None,
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
        self.model, self.recipe, self.newest, self.plan = model, recipe, Newest(), plan
        lease, ranks = Lease(weights=Identity(model)), ranks_of(model, timeout)
        shape = divided(model, check_model(model), ranks)
        check_layers(recipe, shape.kinds)
        check_division(recipe, sum(kind.window is None for kind in shape.kinds))
        check_fit(recipe, shape.kinds)
        turns = tuple(rotations(model)) if needs_rotation(recipe) else ()
        sparse = calibration.thresholds(recipe.sparsity, model, shape)
        known = learned.calibrated(recipe, model, shape)
        check_projections(model, shape.kinds, recipe)
        said = wording(recipe, model, tokenizer)
        head = head_of(recipe, model, shape)
        tiers = make_tiers(model, recipe, shape, caps, cache_dtype)
        grams = output_grams(model, shape.kinds, recipe)
        known_of_it = (turns, sparse, said, known, tiers, head, plan, ranks, grams)
        self.spec = CacheSpec(shape, recipe, page_size, lease, cache_dtype, *known_of_it)
        compresses = recipe.limits is not None or recipe.formats or recipe.sparsity is not None
        self._attachment: Attachment | None = Attachment(model, self.spec, self, compresses)
        _ENGINES[model] = ref(self)

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
            self.spec.lease.active = False

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"<kvpress.Engine {str(self.recipe)!r} on {self._model_name}, {state}>"

    def new_cache(self, max_new_tokens: int | None = None, protect: Any = None) -> EngineCache:
        """An empty cache for transformers' `cache` (`past_key_values` before 5.24).

        max_new_tokens: what schedules of a policy should expect. protect: tokens that are never
        evicted, such as a system prompt: a number of first tokens, ranges `(first, behind the
        last)` without padding, or a list of these for each sequence; see `kvpress.spans_of`. Raises
        CacheError for anything else.
        """
        cache = self.make(max_new_tokens)
        if protect is not None:
            roles.protect(cache, protect)
        self.newest.passed(cache)
        return cache

    def make(self, max_new_tokens: int | None = None, recipe: Recipe | None = None) -> EngineCache:
        """An empty cache that `engine.cache` does not show.

        recipe: that of the engine with another budget; None: its own.
        """
        spec = self.spec if recipe is None else replace(self.spec, recipe=recipe)
        return EngineCache(spec, max_new_tokens)

    def feeding(self) -> Feeding:
        """Passes of single texts and of many at once, for who batches texts himself.

        Raises AttachError where the engine is detached.
        """
        calls = self._attached().calls
        return Feeding(self.model, calls, alone_because(self.model, self.make()))

    def _attached(self) -> Attachment:
        """How it is attached. Raises AttachError where it is not."""
        if self._attachment is None:
            raise AttachError(
                "The engine is detached. Attach it again: kvpress.attach(model, policy)."
            )
        return self._attachment

    def load_cache(self, path: str | Path, lazy: bool = False) -> EngineCache:
        """The cache that `cache.save(path)` wrote, to go on exactly where it was.

        Everything is checked byte by byte before anything is used. lazy: for engines with tiers;
        pages stay in the session's data file, from which each is read, and checked, when it is
        wanted, so that answers begin at once. That file may be removed or replaced meanwhile.
        Raises CacheFileError if a file is not whole, or comes from another model, other weights,
        another policy or another version of the engine; TierError where tiers have no room.
        """
        cache = self.make()
        cache.load(path, cache_file.layer_devices(self.model), lazy)
        self.newest.passed(cache)
        return cache

    @property
    def cache(self) -> EngineCache:
        """The cache to go on from: that of the last `generate()`.

        Before the first one, that of the newest forward pass. A cache that came later by a forward
        pass, `new_cache()` or `load_cache()` goes before it as long as somebody holds it. Threads
        see their own first. Raises AttachError before the first call.
        """
        cache = self.newest.get()
        if cache is None:
            raise AttachError(
                "No cache yet: run generate() or a forward pass of the attached model first."
            )
        return cache

    def generate(
        self,
        *args: Any,
        cache: EngineCache | None = None,
        past_key_values: EngineCache | None = None,
        protect: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`model.generate(...)` with a compressed cache; takes and returns what transformers does.

        Pass the cache of an earlier call as `cache`, or by its older name, to go on from there: the
        ids then are the whole text. protect: of a new cache, see `new_cache`. Raises CacheError
        where the ids are not what the cache has seen.
        """
        self._attached()
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, EngineCache):
            raise CacheError(
                f"engine.generate() continues from caches made by engine.new_cache(), got "
                f"{type(cache).__name__}. Leave the cache out to start a new one."
            )
        if protect is not None:
            cache = self.new_cache() if cache is None else cache
            roles.protect(cache, protect)
        if kwargs.get("use_cache") is False:
            raise CacheError(
                "engine.generate(use_cache=False): it exists to use a cache. Leave the option out,"
                " or call model.generate()."
            )
        return self.model.generate(*args, past_key_values=cache, **kwargs)

    def report(self, cache: EngineCache | None = None) -> Report:
        """The ledger of a cache, by default the newest: slots, bytes, seconds per stage, notes.

        Where processes hold the model together, that of this one, and `ranks` says what each holds:
        all of them ask for it at the same time. `cache.report()` asks nobody.
        """
        own = (self.cache if cache is None else cache).report(self._model_name)
        if self.spec.ranks.alone:
            return own
        return replace(own, ranks=self.spec.ranks.objects(own.own_bytes))

    @property
    def _model_name(self) -> str:
        return getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
