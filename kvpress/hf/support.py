"""Which layers of a model are compressed, kept to a window, or refused, by its config."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from transformers import PreTrainedModel

from kvpress.errors import AttachError, UnsupportedModelError
from kvpress.hf.families import Inline, inline
from kvpress.pipe.state.channels import CHANNELS
from kvpress.types import MOST_WIDTH, LayerKind

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

NAME = "kvpress"  # of the attention implementation

INLINE = "kvpress-inline"  # for models that compute attention by themselves; see inline.py

BIDIRECTIONAL = "bidirectional attention"
STATE = "a state besides keys and values (state-space, linear attention, convolution)"

# transformers' names of layer types -> why such layers are refused
_REASONS = {
    "linear_attention": STATE,
    "hybrid": STATE,
    "hybrid_sliding": STATE,
    "conv": STATE,
    "chunked_attention": "chunked attention",
    "indexed_attention": "sparse attention with an indexer",
}
_ALLOWED = (
    "layers of type 'full_attention' (compressed) and 'sliding_attention' (kept to their window)."
    " Use a decoder-only model of such layers"
)


class Fingerprint(NamedTuple):
    """What a cache and a model must share."""

    model_type: str
    kinds: tuple[LayerKind, ...]
    key_width: int  # of the first layer

    def __str__(self) -> str:
        heads = sorted({kind.heads for kind in self.kinds})
        return (
            f"{self.model_type} with {len(self.kinds)} layers, KV heads {heads}, head size"
            f" {self.key_width}"
        )


def fingerprint(config: Any) -> Fingerprint:
    """The layer kinds of a transformers config.

    Raises UnsupportedModelError, naming what is refused.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        refuse(name, "an encoder and a decoder (encoder-decoder)")
    text = config.get_text_config(decoder=True)
    if text is not config:
        refuse(
            name,
            "several models inside (text with images or sound)",
            "text models. Load its text model alone, with its family's ...ForCausalLM class",
        )
    _check_attention(name, text)
    own = inline(text)
    if own is not None:
        return _inline_fingerprint(name, text, own)
    types = _layer_types(text)
    layers = list(text.per_layer_config) if _varies(text) else [text] * len(types)
    kinds = tuple(
        _kind(name, index, *given) for index, given in enumerate(zip(types, layers, strict=True))
    )
    if not kinds:
        refuse(name, "a config without num_hidden_layers")
    widths = [_width(layer) for layer in layers]
    _check_width(name, max(widths), MOST_WIDTH)
    return Fingerprint(name, kinds, widths[0])


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
    if getattr(text, "kv_lora_rank", None):
        refuse(name, "latent attention (MLA)", detail="kv_lora_rank")
    modes = getattr(text, "kv_sharing_modes", None) or []  # one per layer
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in modes:
        refuse(name, "layers that share their keys and values (KV sharing)")
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
    if model._is_stateful:
        refuse(name, STATE)
    shape = fingerprint(model.config)
    if not shape.kinds[0].inline and not model._can_set_attn_implementation():
        refuse(
            name,
            "attention that bypasses transformers' attention interface",
            "models whose attention goes through ALL_ATTENTION_FUNCTIONS. Use such a model, or a"
            " transformers in which this one does",
        )
    if any(key.endswith(".sinks") for key, _ in model.named_parameters()):
        refuse(name, "learned attention sinks")
    for module in model.modules():
        if getattr(module, "is_causal", True) is False:
            refuse(name, BIDIRECTIONAL, detail=type(module).__name__)
    if model.dtype not in _DTYPES:
        raise UnsupportedModelError(
            f"{name} computes in {model.dtype}. Allowed: {', '.join(map(str, _DTYPES))}. Load it"
            " with one of these.",
            f"computes in {model.dtype}",
        )
    return shape


def refuse_options(name: str, options: str) -> NoReturn:
    """Raises UnsupportedModelError: what the attention of `name` is asked for."""
    raise UnsupportedModelError(
        f"The attention of {name} asks for {options}, which this engine does not support. Drop the"
        " option (for dropout: model.eval()) or detach the engine."
    )
