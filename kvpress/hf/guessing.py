"""What a layer will ask for, guessed from what enters the layer before it.

Neighbouring layers get nearly the same input, since each adds little to it: the next attention,
given what enters this layer, makes nearly the query that it will make (InfiniGen, Lee et al., OSDI
2024, arXiv 2406.19707). It is run itself, from its norm to where it would attend: so nothing needs
to be known of projections and rotations, and on what really enters it the query is exact. That is
proven when an engine is attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import UnsupportedModelError
from kvpress.hf import copies
from kvpress.hf.asking import queries_of
from kvpress.hf.cache import EngineCache
from kvpress.hf.compat import uncompiled
from kvpress.hf.spec import CacheSpec
from kvpress.pipe.stages import retrieve
from kvpress.pipe.state.channels import turned_query

_TOKENS = 3  # of the pass that proves it
_CLOSE = 1e-3  # of the largest channel, by which the proof may be off: kernels may sum in any order


class _Layer(NamedTuple):
    """A layer of a model: what makes queries in it. norm: None where its input is not normed."""

    number: int
    module: Any
    norm: Any
    attention: Any
    names: Sequence[str]  # of the arguments of the module, as they stand

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """What enters the layer, and its other arguments by name."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return given.pop(self.names[0]), given

    def queries(self, hidden_BQC: Tensor, given: dict[str, Any]) -> Tensor | None:
        """Those that it makes of what enters it; None where that cannot be known."""
        normed_BQC = hidden_BQC if self.norm is None else self.norm(hidden_BQC)
        return queries_of(self.attention, normed_BQC, given)


class Guessing:
    """Hooks that guess, in every decode step, by what enters the layer before.

    model: with an engine attached. layers: whose queries are guessed. cache: an empty one, for the
    proof, and name: under which a model takes it. Raises UnsupportedModelError where queries do not
    follow from what enters a layer.
    """

    def __init__(self, model: Any, layers: Sequence[int], cache: EngineCache, name: str) -> None:
        known = _proven(model, layers, cache, name)
        self._hooked: list[tuple[Any, Any]] = []
        for index in layers:
            module = known[index - 1].module
            hook = partial(_guess, known[index - 1], known[index])
            handle = module.register_forward_pre_hook(uncompiled(hook), with_kwargs=True)
            copies.copied_plain(module, [handle.id], [], lambda twin: None)
            self._hooked.append((module, handle))

    def remove(self) -> None:
        """Leaves the model as it was."""
        for module, handle in self._hooked:
            handle.remove()
            copies.forget(module)


def guessed(spec: CacheSpec) -> list[int]:
    """The layers of which queries are guessed by what enters the layer before."""
    if spec.tiers is None:
        return []  # all pages are there
    rule = spec.recipe.stage("retrieve").retrieve
    own = ((kind, rule(kind.index)) for kind in spec.fingerprint.kinds if kind.window is None)
    found = [kind.index for kind, of in own if of and of.guess == "layer" and kind.index]
    if found and spec.fingerprint.states:
        name, reason = spec.fingerprint.model_type, "it has layers of other kinds between"
        raise UnsupportedModelError(
            f"guess=layer: queries of {name!r} cannot be guessed from what enters the layer before:"
            f" {reason}. Use guess=none.",
            reason,
        )
    return found


@torch.no_grad()
def _guess(
    this: _Layer, following: _Layer, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Before a layer runs: begins to load what the next one will most likely choose."""
    hidden_BQC, given = this.arguments(args, kwargs)
    if hidden_BQC.shape[1] != 1 or given.get("attention_mask") is not None:
        return  # a prompt, or padding among the new tokens
    cache = next((x for x in given.values() if isinstance(x, EngineCache)), None)
    if cache is None or cache.context.looks or not retrieve.loads(cache.states[following.number]):
        return
    query_BN1D = following.queries(hidden_BQC, given)
    if query_BN1D is not None:
        state = cache.states[following.number]
        retrieve.guess(state, turned_query(query_BN1D, state.recipe))


class _Pass:
    """What a forward pass of a few tokens says of every layer, by its number."""

    def __init__(self) -> None:
        self.entered: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}  # each layer
        self.made: dict[int, list[tuple[Any, Any]]] = {}  # by parts of a layer: what came out
        self.attended: dict[int, Any] = {}  # what entered each attention
        self.query: dict[int, Tensor] = {}

    def enters(self, index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered[index] = (args, kwargs)

    def makes(self, index: int, part: Any, args: Any, out: Any) -> None:
        self.made.setdefault(index, []).append((part, out))

    def attends(self, index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.attended[index] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def asks(self, index: int, layer: Any, query: Tensor, key: Any, value: Any, *_: Any) -> Tensor:
        """In the place of attention over a cache, which stays empty."""
        layer.waiting, self.query[index] = None, query
        return query.new_zeros(*query.shape[:3], value.shape[-1])


def _proven(model: Any, layers: Sequence[int], cache: EngineCache, name: str) -> dict[int, _Layer]:
    """The layers of a model; those that are asked for have the queries that they should."""
    attentions, said = _attentions(model), _Pass()
    missing = [index for index in layers if not {index, index - 1} <= attentions.keys()]
    if missing:
        _refuse(model, missing[0], "no attention of its own is found in it and in the one before")
    parents = {child: module for module in model.modules() for child in module.children()}
    modules = {index: parents[attention] for index, attention in attentions.items()}
    with _noted(model, said, attentions, modules, cache):
        id_1Q = (host.arange(_TOKENS)[None] + 1).to(model.get_input_embeddings().weight.device)
        model.base_model(input_ids=id_1Q, use_cache=True, **{name: cache})
        known = {
            index: _Layer(index, module, None, attentions[index], _names(module))
            for index, module in modules.items()
        }
        for index in layers:
            own = known[index] = known[index]._replace(norm=_norm(model, index, said, known))
            hidden_BQC, _ = own.arguments(*said.entered[index])
            _, given = known[index - 1].arguments(*said.entered[index - 1])
            wanted = said.query.get(index)
            try:
                query = own.queries(hidden_BQC, given)
            except (RuntimeError, TypeError) as error:
                _refuse(
                    model, index, f"it cannot be run with what the one before is given ({error})"
                )
            if query is None or wanted is None or query.shape != wanted.shape:
                _refuse(model, index, "it does not attend through the attention interface")
            if float((query - wanted).abs().max()) > _CLOSE * float(wanted.abs().max()):
                _refuse(
                    model, index, "its norm and its attention make another query of what enters"
                )
    return known


def _attentions(model: Any) -> dict[int, Any]:
    """The attention of every layer: what has a number, and no part that has one."""
    numbered = [module for module in model.modules() if hasattr(module, "layer_idx")]
    inner = [x for x in numbered if not any(hasattr(y, "layer_idx") for y in [*x.modules()][1:])]
    return {module.layer_idx: module for module in inner}


def _names(module: Any) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _norm(model: Any, index: int, said: _Pass, known: dict[int, _Layer]) -> Any:
    """The part of a layer whose output enters its attention; None where its input does."""
    inside = said.attended[index]
    if inside is known[index].arguments(*said.entered[index])[0]:
        return None
    for part, out in said.made.get(index, []):
        if out is inside:
            return part
    _refuse(model, index, "what enters its attention comes from no norm that is part of it")


@contextmanager
def _noted(
    model: Any,
    said: _Pass,
    attentions: dict[int, Any],
    modules: dict[int, Any],
    cache: EngineCache,
) -> Iterator[None]:
    """Notes what a pass with this cache says; dropout is off meanwhile."""
    hooks: list[Any] = []
    for index, module in modules.items():
        own, parts = attentions[index], [x for x in module.children() if x is not attentions[index]]
        enters, attends = partial(said.enters, index), partial(said.attends, index)
        hooks.append(module.register_forward_pre_hook(enters, with_kwargs=True))
        hooks.append(own.register_forward_pre_hook(attends, with_kwargs=True))
        hooks += [part.register_forward_hook(partial(said.makes, index)) for part in parts]
        layer = cache.layers[index]
        vars(layer)["attend"] = partial(said.asks, index, layer)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for hook in hooks:
            hook.remove()
        for index in modules:
            vars(cache.layers[index]).pop("attend")


def _refuse(model: Any, index: int, reason: str) -> NoReturn:
    raise UnsupportedModelError(
        f"guess=layer: the queries of layer {index} of {type(model).__name__} cannot be guessed"
        f" from what enters the layer before: {reason}. Use guess=none.",
        reason,
    )
