"""Which layers of a model are compressed, kept to a window, or refused, by its config."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvpress.errors import UnsupportedModelError
from kvpress.run import LayerKind

_TODO = "Use a decoder-only model whose layers are full or sliding-window attention."


class Fingerprint(NamedTuple):
    """What a cache and a model must share."""

    model_type: str
    kinds: tuple[LayerKind, ...]
    key_width: int | None

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
        _refuse(name, "an encoder-decoder model")
    text = config.get_text_config(decoder=True)
    if getattr(text, "add_cross_attention", False) or getattr(text, "cross_attention_layers", None):
        _refuse(name, "a decoder with cross-attention layers")
    if getattr(text, "kv_lora_rank", None):
        _refuse(name, "latent attention (MLA, kv_lora_rank)")
    if getattr(text, "num_kv_shared_layers", 0) or getattr(text, "kv_sharing_modes", None):
        _refuse(name, "layers that share their keys and values (KV sharing)")
    if getattr(text, "use_bidirectional_attention", False) or not getattr(text, "is_causal", True):
        _refuse(name, "bidirectional attention")
    heads: int = getattr(text, "num_key_value_heads", 0) or getattr(text, "num_attention_heads", 0)
    if not heads or not getattr(text, "num_hidden_layers", 0):
        _refuse(name, "a config without num_attention_heads or num_hidden_layers")
    kinds = tuple(
        _kind(name, index, kind, heads, getattr(text, "sliding_window", None))
        for index, kind in enumerate(_layer_types(text))
    )
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Fingerprint(name, kinds, width)


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
    return [kind] * text.num_hidden_layers


def _kind(name: str, index: int, layer_type: str, heads: int, window: int | None) -> LayerKind:
    if layer_type == "full_attention":
        return LayerKind(index, heads)
    if layer_type == "sliding_attention" and window is not None and window >= 2:
        return LayerKind(index, heads, window)
    detail = f" with sliding_window={window}" if layer_type == "sliding_attention" else ""
    _refuse(name, f"layer {index} of type {layer_type!r}{detail}")
    raise AssertionError("unreachable")


def _refuse(name: str, what: str) -> None:
    raise UnsupportedModelError(
        f"The model {name!r} has {what}, which this engine does not compress. Allowed: layers of"
        " type 'full_attention' (compressed) and 'sliding_attention' (kept to their window)."
        f" {_TODO}"
    )
