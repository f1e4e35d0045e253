"""Which layers of a model are compressed, kept to a window, or refused, by its config."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from transformers import PreTrainedModel

from kvpress.errors import AttachError, UnsupportedModelError
from kvpress.hf import latent
from kvpress.hf.families import Inline, inline
from kvpress.hf.sinks import Refused, with_sinks
from kvpress.hf.unwrap import text_model
from kvpress.pipe.state.channels import CHANNELS
from kvpress.types import MOST_WIDTH, LayerKind, StateKind

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

NAME = "kvpress"  # of the attention implementation

INLINE = "kvpress-inline"  # for models that compute attention by themselves; see inline.py

BIDIRECTIONAL = "bidirectional attention"
STATE = "a state that is in no cache of transformers"

# transformers' names of layer types -> why such layers are refused
_REASONS = {
    "indexed_attention": "sparse attention with an indexer",
}
_CHUNKED = "chunked_attention"
# Layers that keep states, and perhaps keys and values as another type does.
_STATES = {
    "linear_attention": "",
    "conv": "",
    _CHUNKED: "",
    "hybrid": "full_attention",
    "hybrid_sliding": "sliding_attention",
}
_OWN_STATE = "recurrent_states"  # an attribute of modules that keep their state themselves
_EMPTY = ("moe", "mlp", "dummy")  # layers that keep nothing
_ALLOWED = (
    "layers of type 'full_attention' (compressed), 'sliding_attention' (kept to their window), and"
    " those of linear attention, convolutions and state spaces (kept as they are). Use a"
    " decoder-only model of such layers"
)


class Fingerprint(NamedTuple):
    """What a cache and a model must share.

    kinds: of the layers with keys and values. key_width: of the first one. states: layers that keep
    something else, or nothing.
    """

    model_type: str
    kinds: tuple[LayerKind, ...]
    key_width: int
    states: tuple[StateKind, ...] = ()

    def __str__(self) -> str:
        heads = sorted({kind.heads for kind in self.kinds})
        held = sum(state.count > 0 for state in self.states)
        return (
            f"{self.model_type} with {len(self.kinds)} layers, KV heads {heads}, head size"
            f" {self.key_width}" + (f", states in {held} layers" if held else "")
        )


def fingerprint(config: Any) -> Fingerprint:
    """The layer kinds of a transformers config.

    Raises UnsupportedModelError, naming what is refused.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        refuse(name, "an encoder and a decoder (encoder-decoder)")
    text = config.get_text_config(decoder=True)
    _check_attention(name, text)
    own = inline(text)
    if own is not None:
        return _inline_fingerprint(name, text, own)
    types = _layer_types(text)
    layers = list(text.per_layer_config) if _varies(text) else [text] * len(types)
    if not types:
        refuse(name, "a config without num_hidden_layers")
    types, readers = _without_readers(name, text, types)
    given = list(enumerate(zip(types, layers, strict=True)))
    states = tuple(_state(i, *each) for i, each in given if each[0] in (*_STATES, *_EMPTY))
    attending = [(i, _STATES.get(kind, kind), config) for i, (kind, config) in given]
    made = [_kind(name, *each) for each in attending if each[1] and each[1] not in _EMPTY]
    kinds = tuple(replace(kind, readers=readers[kind.index]) for kind in made)
    if not kinds:
        refuse(name, "no layer with attention: there is nothing that a policy could compress")
    _check_width(name, max(kind.width for kind in kinds), MOST_WIDTH)
    return Fingerprint(name, kinds, kinds[0].width, states)


def _without_readers(name: str, text: Any, types: list[str]) -> tuple[list[str], Counter[int]]:
    """The types, of layers that keep nothing for those that read others, and how many read each.

    A reader reads the last layer of its type that has keys of its own.
    """
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    modes = getattr(text, "kv_sharing_modes", None)  # one per layer
    if modes is None:
        modes = [None] * (len(types) - shared) + ["reuse"] * shared
    readers, made, last = Counter[int](), list(types), dict[str, int]()
    for index, (mode, kind) in enumerate(zip(modes, types, strict=True)):
        if mode != "reuse":
            last[kind] = index
        elif kind not in last:
            refuse(name, f"layers of type {kind!r} that share keys which no layer before them has")
        else:
            readers[last[kind]] += 1
            made[index] = _EMPTY[-1]
    return made, readers


def _state(index: int, layer_type: str, config: Any) -> StateKind:
    """What a layer keeps besides keys and values."""
    if layer_type == _CHUNKED:
        return StateKind(index, 0, chunk=config.attention_chunk_size)
    count = getattr(config, "number_of_conv_states", 1) if layer_type in _STATES else 0
    return StateKind(index, count, bool(_STATES.get(layer_type)))


def _inline_fingerprint(name: str, text: Any, own: Inline) -> Fingerprint:
    """The fingerprint of a model that computes its attention by itself."""
    width = _width(text)
    kinds = (
        LayerKind(index, own.heads, None, True, own.slopes, text.num_attention_heads, width)
        for index in range(text.num_hidden_layers)
    )
    _check_width(name, width, MOST_WIDTH - (0 if own.slopes is None else CHANNELS))
    return Fingerprint(name, tuple(kinds), width)


def _check_width(name: str, width: int, most: int) -> None:
    if width > most:
        refuse(name, f"heads of more than {most} channels", detail=f"{width}")


def _width(config: Any) -> int:
    """Channels of a key."""
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def _varies(text: Any) -> bool:
    """Whether layers have fields of their own, which the config of the model then does not show."""
    return bool(getattr(text, "is_heterogeneous", False))


def _check_attention(name: str, text: Any) -> None:
    """Raises UnsupportedModelError for kinds of attention that a config shows by other fields."""
    if getattr(text, "add_cross_attention", False) or getattr(text, "cross_attention_layers", None):
        refuse(name, "cross-attention layers")
    # Between image tokens only ("vision") is a matter of the mask, which text does not ask for.
    both = getattr(text, "use_bidirectional_attention", None)
    if both not in (None, False, "vision") or not getattr(text, "is_causal", True):
        refuse(name, BIDIRECTIONAL)


def _layer_types(text: Any) -> list[str]:
    """The layer types that a config declares, or those that follow from its other fields."""
    declared = getattr(text, "layer_types", None)
    if declared is not None:
        return list(declared)
    if getattr(text, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(text, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    else:
        kind = "full_attention"
    return [kind] * (getattr(text, "num_hidden_layers", None) or 0)


def _kind(name: str, index: int, layer_type: str, config: Any) -> LayerKind:
    """How a layer attends, by its type and its config.

    Raises UnsupportedModelError unless that is full or sliding-window attention.
    """
    if latent.is_latent(config) and layer_type == "full_attention":
        return latent.kind_of(index, config)
    heads = getattr(config, "num_key_value_heads", 0) or getattr(config, "num_attention_heads", 0)
    window = getattr(config, "sliding_window", None)
    if layer_type not in ("full_attention", "sliding_attention"):
        reason = _REASONS.get(layer_type, f"layers of type {layer_type!r}")
        refuse(name, reason, detail=f"layer {index} of type {layer_type!r}")
    if not heads:
        refuse(name, "a config without num_attention_heads")
    sizes = {"queries": config.num_attention_heads, "width": _width(config)}
    if layer_type == "full_attention":
        return LayerKind(index, heads, **sizes)
    if window is None or window < 2:
        refuse(name, "windows below two tokens", detail=f"layer {index}, sliding_window={window}")
    return LayerKind(index, heads, window, **sizes)


def refuse(name: str, reason: str, allowed: str = _ALLOWED, detail: str = "") -> NoReturn:
    """Raises UnsupportedModelError: which model has what, what is allowed, what to do."""
    what = f"{reason} ({detail})" if detail else reason
    raise UnsupportedModelError(
        f"The model {name!r} has {what}, which this engine does not support. Allowed: {allowed}.",
        reason,
    )


def check_model(model: Any) -> Fingerprint:
    """The layer kinds of a model that the engine can be attached to.

    Raises AttachError or UnsupportedModelError.
    """
    if not isinstance(model, PreTrainedModel):
        raise AttachError(
            f"attach() takes a transformers model, got {type(model).__name__}. Load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if model.config._attn_implementation in (NAME, INLINE):
        raise AttachError(
            "An engine is already attached to this model, or to one that shares its config object."
            " Detach it first: engine.detach(), or kvpress.detach(model) where nobody kept it."
        )
    name = type(model).__name__
    if model.config.output_attentions:
        refuse_options(name, "output_attentions")
    shape, text = fingerprint(model.config), text_model(model)
    if text is None:
        refuse(
            name,
            "several models inside, none of which is known as its text model",
            "models with one text model. Load that alone, with its family's ...ForCausalLM class",
        )
    holders = sorted({type(x).__name__ for x in text.modules() if hasattr(x, _OWN_STATE)})
    if model._is_stateful and (holders or not shape.states):
        refuse(name, STATE, detail=", ".join(holders))
    if not shape.kinds[0].inline and not text._can_set_attn_implementation():
        refuse(
            name,
            "attention that bypasses transformers' attention interface",
            "models whose attention goes through ALL_ATTENTION_FUNCTIONS. Use such a model, or a"
            " transformers in which this one does",
        )
    kinds = with_sinks(text, shape.kinds)
    if isinstance(kinds, Refused):
        refuse(shape.model_type, kinds.reason, detail=kinds.detail)
    shape = shape._replace(kinds=kinds)
    _check_text(name, text, shape)
    return shape


def _check_text(name: str, text: Any, shape: Fingerprint) -> None:
    """Raises UnsupportedModelError for what the modules of a text model show."""
    latent.check_modules(name, text, shape.kinds)
    for module in text.modules():
        if getattr(module, "is_causal", True) is False:
            refuse(name, BIDIRECTIONAL, detail=type(module).__name__)
    if text.dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{name} computes in {text.dtype}. Allowed: {', '.join(map(str, _DTYPES))}. Load it"
            " with one of these.",
            f"computes in {text.dtype}",
        )


def refuse_options(name: str, options: str) -> NoReturn:
    """Raises UnsupportedModelError: what the attention of `name` is asked for."""
    raise UnsupportedModelError(
        f"The attention of {name} asks for {options}, which this engine does not support. Drop the"
        " option (for dropout: model.eval()) or detach the engine."
    )
