"""Hidden states and output projections of a model's attention, while probes are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.formulas.norms import Norms, grams
from kvpress.hf.ranks import own_part
from kvpress.hf.unwrap import text_model
from kvpress.pipe.state.context import Context
from kvpress.policy.recipe import Recipe
from kvpress.policy.slots import Step
from kvpress.types import LayerKind

_PROJECTIONS = ("o_proj", "out_proj", "dense")


@contextmanager
def noted(model: Any, context: Context, recipe: Recipe) -> Iterator[None]:
    """Where a recipe needs it, every layer's hidden states are noted as they pass."""

    kinds = [layer.kind for layer in context.layers]
    columns = {kind.index: kind.queries * kind.width for kind in kinds}

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_BQC: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        norm_BQ = hidden_BQC.detach().float().norm(dim=-1)
        weight_CX = own_part(_projection(module).weight.detach(), columns[module.layer_idx])
        context.norms[module.layer_idx] = Norms(norm_BQ, weight_CX)

    found = _attentions(model).values() if relative(recipe) else ()
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        context.norms = {}


def relative(recipe: Recipe) -> bool:
    """Whether what a recipe observes is relative to hidden states."""
    request = recipe.stage("observe").observe(Step(0, 0, 1, 1))
    return request is not None and request.relative


def output_grams(model: Any, kinds: Iterable[LayerKind], recipe: Recipe) -> tuple[Tensor, ...]:
    """WᵀW of the output projections of all layers, where a recipe needs them; see `grams`."""
    if "output" not in recipe.needs:
        return ()
    found = _attentions(model)
    return tuple(
        grams(
            own_part(_projection(found[kind.index]).weight.detach(), kind.queries * kind.width),
            kind.width,
        )
        for kind in kinds
    )


def check_projections(model: Any, kinds: Iterable[LayerKind], recipe: Recipe) -> None:
    """Raises PolicyError or UnsupportedModelError where a recipe cannot have what it needs."""
    if not relative(recipe) and "output" not in recipe.needs:
        return
    if relative(recipe) and not recipe.probes:
        raise PolicyError(
            f"{recipe} observes attention relative to hidden states, which are known of probes"
            " alone. Replace `probes` too, or observe without `relative`."
        )
    found = _attentions(model)  # those of latents have values that are no head's
    missing = [kind.index for kind in kinds if kind.index not in found or kind.latent]
    if missing:
        raise UnsupportedModelError(
            f"{recipe} needs the output projection of every attention as a plain linear layer"
            f" ({', '.join(_PROJECTIONS)}), which layers {missing} of {type(model).__name__} do not"
            " have. Use the policy without it, or weights that are neither quantised nor wrapped."
        )


def _attentions(model: Any) -> dict[int, Any]:
    """The attention of every layer that has a projection which can be read."""
    modules = (module for module in text_model(model).modules() if hasattr(module, "layer_idx"))
    modules = (module for module in modules if not hasattr(module, "conv1d"))  # a state space
    return {module.layer_idx: module for module in modules if _projection(module) is not None}


def _projection(module: Any) -> Any:
    found = (getattr(module, name, None) for name in _PROJECTIONS)
    return next((part for part in found if type(part) is nn.Linear), None)
