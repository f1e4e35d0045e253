"""Every member of transformers' cache and layer classes is answered, or left out for a reason."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

import helpers
import pytest
import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

import kvpress
from kvpress.errors import CacheError
from kvpress.hf.cache import EngineCache
from kvpress.hf.cache_layer import EngineLayer

CONTAINER = {"__len__", "__iter__", "__getitem__", "__contains__"}

# Why the engine does not implement a member itself -> the members.
LAYER_TABLE: dict[str, set[str]] = {
    "inherited: None, since the engine registers no layer type": {"_layer_type"},
    "read only by the classes that own it; the engine keeps a logical length and a window itself": {
        "cumulative_length",
        "cumulative_length_int",
        "sliding_window",
        "device",
        "dtype",
    },
    "the cache answers for all its layers": {"activate_past_recording"},
    "of layers that reserve everything in advance": {
        "max_batch_size",
        "max_cache_len",
        "num_heads",
        "k_head_dim",
        "v_head_dim",
    },
    "of layers that quantise: the engine has formats of its own": {
        "axis_key",
        "axis_value",
        "fp8_dtype",
        "fp8_max",
        "nbits",
        "optimizer",
        "q_group_size",
        "qtype",
        "quantizer",
        "residual_length",
    },
    "of layers with an indexer: such models are refused": {
        "indexer_cumulative_length",
        "indexer_device",
        "indexer_dtype",
        "indexer_keys",
        "indexer_position_ids",
        "is_indexer_initialized",
        "lazy_initialization_indexer",
        "update_indexer",
    },
    "of linear and hybrid layers: such models are refused": {
        "conv_kernel_size",
        "conv_states",
        "has_previous_state",
        "is_conv_states_initialized",
        "is_recurrent_states_initialized",
        "number_of_states",
        "recurrent_states",
        "update_conv_state",
        "update_recurrent_state",
    },
}
CACHE_TABLE: dict[str, set[str]] = {
    "inherited: asks every layer": {
        "__len__",
        "batch_repeat_interleave",
        "batch_select_indices",
        "batch_size",
        "early_initialization",
        "get_mask_sizes",
        "get_max_cache_shape",
        "get_max_length",
        "get_query_offset",
        "get_seq_length",
        "is_compileable",
        "is_dummy",
        "is_linear",
        "is_recording_past",
        "is_sliding",
        "layers",
        "reorder_cache",
        "reset",
    },
    "inherited: refuses, since no layer has such states": {
        "get_conv_state",
        "get_recurrent_state",
        "has_previous_state",
        "update_conv_state",
        "update_indexer",
        "update_recurrent_state",
    },
    "inherited: None, since layers are made at once": {"layer_class_to_replicate"},
    "of caches that reserve everything in advance": {"max_batch_size", "max_cache_len"},
    "inherited: transformers' offloading, which every layer refuses": {
        "offload",
        "offloading",
        "only_non_sliding",
        "prefetch",
        "prefetch_stream",
    },
    "of caches of plain tensors": {"__iter__"},
    "of encoder-decoder models, which are refused": {
        "check_dynamic_cache",
        "cross_attention_cache",
        "is_updated",
        "self_attention_cache",
    },
    "of drafting heads, which keep caches of their own": {"set_previous_accepted_tokens"},
}


def classes(base: type) -> list[type]:
    """A class of transformers' cache module and all that derive from it there."""
    found = vars(cache_utils).values()
    return [c for c in found if inspect.isclass(c) and issubclass(c, base)]


@cache
def assigned(cls: type) -> set[str]:
    """The attributes that the methods of a class assign to `self`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def members(cls: type) -> set[str]:
    """The public members of a class: methods, properties, and attributes of it or of instances."""
    named = {*vars(cls), *assigned(cls)}
    return {name for name in named if not name.startswith("_") or name in CONTAINER}


def unanswered() -> list[str]:
    """Members that neither the engine nor the tables answer, as `Class.member`."""
    found = []
    for ours, base, table in (
        (EngineLayer, CacheLayerMixin, LAYER_TABLE),
        (EngineCache, Cache, CACHE_TABLE),
    ):
        answered = members(ours).union(*table.values())
        for cls in classes(base):
            bases = [b for b in cls.__mro__ if b in classes(object)]
            names = set().union(*map(members, bases)) - answered
            found += [f"{cls.__name__}.{name}" for name in sorted(names)]
    return found


def check() -> None:
    missing = unanswered()
    assert not missing, (
        f"transformers' caches have members that the engine does not answer: {', '.join(missing)}."
        " Implement them in kvpress/hf/cache.py, or add them to the table above with the reason."
    )


def test_every_member_is_answered_or_left_out_for_a_reason() -> None:
    assert DynamicLayer in classes(CacheLayerMixin)
    check()


@pytest.mark.parametrize("kind", ["method", "property", "attribute"])
@pytest.mark.parametrize("cls", [CacheLayerMixin, cache_utils.DynamicSlidingWindowLayer, Cache])
def test_a_new_member_is_named(cls: type, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = {"method": lambda self: None, "property": property(id), "attribute": 3}[kind]
    monkeypatch.setattr(cls, "shrink", new, raising=False)
    with pytest.raises(AssertionError, match=rf"{cls.__name__}\.shrink"):
        check()


def test_a_new_attribute_of_instances_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grown(DynamicLayer):
        def __init__(self) -> None:
            super().__init__()
            self.roots = 4

    monkeypatch.setattr(cache_utils, "Grown", Grown, raising=False)
    with pytest.raises(AssertionError, match=r"engine does not answer: Grown\.roots\."):
        check()


def refused(ours: Any, theirs: Any) -> list[str]:
    """Arguments that a method of transformers takes and ours does not."""
    taken = inspect.signature(ours).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    asked = [p.name for p in inspect.signature(theirs).parameters.values() if p.kind in named]
    return [name for name in asked if name not in taken]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(EngineLayer, CacheLayerMixin), (EngineLayer, DynamicLayer), (EngineCache, Cache)],
)
def test_what_is_answered_takes_the_same_arguments(ours: type, theirs: type) -> None:
    shared = [n for n in vars(ours) if not n.startswith("_") and callable(getattr(theirs, n, None))]
    assert "update" in shared and ("crop" in shared or theirs is CacheLayerMixin)
    wrong = {n: refused(getattr(ours, n), getattr(theirs, n)) for n in shared}
    assert not any(wrong.values()), wrong


def test_what_is_inherited_answers_rightly() -> None:
    model, ids = helpers.tiny("gemma3"), helpers.prompt(2, 30)
    with torch.no_grad(), kvpress.attach(model, "h2o:budget=0.5"):
        ours = model(ids).past_key_values
    assert ours.is_sliding == [True, False, True]
    assert ours.is_compileable is False and ours.batch_size == 2 and len(ours) == 3
    assert ours.get_seq_length() == ours.get_seq_length(1) == 30
    assert [ours.get_mask_sizes(4, layer) for layer in range(3)] == [(34, 0)] * 3
    assert not any(getattr(ours, "is_linear", [])) and not any(getattr(ours, "is_dummy", []))
    assert getattr(ours, "get_query_offset", ours.get_seq_length)(1) == 30
    assert ours.is_initialized
    for name in ("keys", "values"):
        with pytest.raises(CacheError, match="lies in pages"):
            getattr(ours.layers[0], name)
    ours.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))  # nothing to reserve
    assert ours.get_seq_length() == 30
    for name in ("get_conv_state", "get_recurrent_state", "has_previous_state"):
        if hasattr(ours, name):
            with pytest.raises(ValueError, match="layer"):
                getattr(ours, name)(1)
