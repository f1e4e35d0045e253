"""How a model turns its keys by their positions (RoPE), proven on the model itself.

Caches get keys already rotated. What the modules of a model declare about that is only a candidate:
a small forward pass gives the keys of every layer for one and the same input at several positions,
and a candidate must turn one of them into all the others.

RoPE: Su et al., Neurocomputing 2024 (arXiv 2104.09864), equation 15.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import UnsupportedModelError
from kvpress.formulas.rotation import Rotation
from kvpress.hf.latent import joined
from kvpress.hf.support import fingerprint
from kvpress.types import LayerKind

# Types whose frequencies are the same at every length. Others change theirs with the longest
# sequence of a call, which no short probe can see.
_FIXED = {"default", "linear", "llama3", "proportional", "yarn"}
_STARTS = (0, 7, 40, 300, 5000)  # of the probed sequences; one more ends at the last position
_TOKENS = 3  # of each: then a model that counts by itself, whatever position_ids say, is found out
_ULPS = 8  # that a key of the model may be away from one that is turned in fp32
_EPS = torch.finfo(torch.float32).eps


def rotations(model: Any) -> list[Rotation | None]:
    """How every layer turns its keys; None where keys are the same at every position, or are none.

    For models that no engine is attached to. Raises UnsupportedModelError where keys do not turn by
    a fixed angle per position, or nobody knows by which.
    """
    _check_declared(model)
    frequencies, (position_BT, keys) = _frequencies(model), _probe(model)
    found: list[Rotation | None] = []
    for layer, key in enumerate(keys):
        if key is None:
            found.append(None)
            continue
        position_Bt = position_BT[:, -key.shape[2] :].to(key.device)  # of those in its window
        found.append(_explanation(model, layer, key, position_Bt, frequencies))
    return found


def _check_declared(model: Any) -> None:
    """Raises UnsupportedModelError for what shows only at some lengths, or only with images."""
    config = model.config.get_text_config(decoder=True)
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    declared = [given, *(of_type for of_type in given.values() if isinstance(of_type, dict))]
    types = {options.get("rope_type", options.get("type")) for options in declared}
    axes = any("mrope_section" in options for options in declared)
    for module in model.modules():
        own = getattr(module, "rope_type", None)
        types |= set(own.values()) if isinstance(own, dict) else {own}
        axes = axes or getattr(module, "mrope_section", None) is not None
    if axes:
        _refuse(model, "positions with several axes (M-RoPE)")
    unfixed = ", ".join(sorted(repr(name) for name in types - _FIXED - {None}))
    if unfixed:
        fixed = ", ".join(sorted(_FIXED))
        _refuse(
            model, f"frequencies of rope_type {unfixed}, which are not known as fixed ({fixed})"
        )


def _frequencies(model: Any) -> list[Tensor]:
    """Candidates, fp32 `[F]` each: those that the modules of a model hold."""
    found = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    width = getattr(model.config, "rotary_dim", None)
    if width:  # GPT-J and CodeGen hold a table of sines instead
        found.append(1.0 / (10000 ** (host.arange(0, width, 2).float() / width)))
    unique: list[Tensor] = []
    for frequency in (f.detach().float().cpu() for f in found if not f.is_meta and f.dim() == 1):
        if not any(torch.equal(frequency, other) for other in unique):
            unique.append(frequency)
    return unique


def _probe(model: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Positions `[B, T]`, and the keys `[B, H, t, D]` of their last t tokens in every layer.

    None for layers that have none.
    """
    config = model.config.get_text_config(decoder=True)
    end = (getattr(config, "max_position_embeddings", None) or 512) - _TOKENS
    starts = sorted({end, *(start for start in _STARTS if start < end)})
    position_BT = host.tensor(starts)[:, None] + host.arange(_TOKENS)
    device = torch.device("cpu") if model.device.type == "meta" else model.device  # offloaded
    given = {"input_ids": torch.ones_like(position_BT, device=device)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = position_BT.to(device)
    else:
        position_BT = host.arange(_TOKENS).expand_as(position_BT)
    with torch.no_grad(), _prepared(model, position_BT.shape):
        out = model(**given, use_cache=True, return_dict=True)
    cache = next((out[name] for name in ("cache", "past_key_values") if name in out), None)
    kinds = {kind.index: kind for kind in fingerprint(model.config).kinds}
    layers = enumerate(getattr(cache, "layers", []))
    keys: list[Any] = [_keys(layer, kinds[i]) if i in kinds else None for i, layer in layers]
    counts = [0 if key is None else key.shape[2] for key in keys]
    own = [counts[index] for index in kinds if index < len(keys)]
    if len(own) < len(kinds) or not all(0 < n <= _TOKENS for n in own):
        _refuse(
            model,
            f"a cache without one key per layer and token (layers of {counts} keys for"
            f" {_TOKENS} tokens)",
        )
    behind = config.num_hidden_layers - len(keys)  # layers that have no place in the cache at all
    return position_BT, [*keys, *[None] * behind]


def _keys(layer: Any, kind: LayerKind) -> Tensor | None:
    """What a layer of transformers holds as the engine would: latents beside what turns."""
    key: Tensor | None = getattr(layer, "keys", None)
    return joined(key, layer.values) if kind.latent and key is not None else key


@contextmanager
def _prepared(model: Any, shape: torch.Size) -> Iterator[None]:
    """Lets the tokens of a pass of this shape come to every attention as one and the same vector.

    Keys then differ only by what attention does with positions: neither positions that were added
    to the embeddings nor what lower layers made of theirs are left. Dropout is off; all of it and
    the random state are put back.
    """

    def same(hidden: Any) -> Any:
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != shape:
            return hidden
        vector = torch.randn(
            hidden.shape[-1],
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float32,
            device="cpu",
        )
        return vector.to(hidden).expand_as(hidden).contiguous()

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {k: same(v) if k == "hidden_states" else v for k, v in kwargs.items()}
        return (*map(same, args[:1]), *args[1:]), given

    modes = [(module, module.training) for module in model.modules()]
    attentions = [module for module in model.modules() if hasattr(module, "layer_idx")]
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in attentions]
    try:
        with torch.random.fork_rng(list({w.device for w in model.parameters() if w.is_cuda})):
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for hook in hooks:
            hook.remove()


def _explanation(
    model: Any, layer: int, key_BHTD: Tensor, position_BT: Tensor, frequencies: list[Tensor]
) -> Rotation | None:
    """The candidate that turns the first key into all the others best; None if they are equal.

    Raises UnsupportedModelError if none does within rounding.
    """
    key_BHTD, eps = key_BHTD.float(), torch.finfo(key_BHTD.dtype).eps
    first_BHTD = key_BHTD[:1, :, :1].expand_as(key_BHTD)
    by_BHT = (position_BT - position_BT[0, 0])[:, None]
    # Rounding of the dtype, of angles, and of products of matrices, which may differ by row.
    most_HD = key_BHTD.abs().amax((0, 2), keepdim=True)
    allowed_BHTD = (_ULPS * eps + by_BHT[..., None].float() * _EPS) * most_HD
    allowed_BHTD = (allowed_BHTD + 32 * _EPS * most_HD.amax(-1, keepdim=True)).clamp_min(1e-30)

    def misfit(turned_BHTD: Tensor) -> float:
        return float(((turned_BHTD - key_BHTD).abs() / allowed_BHTD).max())

    if misfit(first_BHTD) <= 1:
        return None
    width, device = key_BHTD.shape[-1], key_BHTD.device
    candidates = [
        Rotation(sign * frequency.to(device), interleaved, start)
        for frequency in frequencies
        if 2 * len(frequency) <= width
        for start in sorted({0, width - 2 * len(frequency)})
        for interleaved in (False, True)
        for sign in (1, -1)
    ]
    fits = [misfit(candidate.turn(first_BHTD, by_BHT)) for candidate in candidates]
    if not min(fits, default=torch.inf) <= 1:
        known = f"{len(frequencies)} sets of frequencies are known, none explains layer {layer}"
        _refuse(model, f"keys that depend on their positions in an unknown way ({known})")
    return candidates[fits.index(min(fits))]


def _refuse(model: Any, reason: str) -> NoReturn:
    raise UnsupportedModelError(
        f"The model {model.config.model_type!r} has {reason}: its keys cannot be turned to another"
        " position. Allowed: rotary embeddings of fixed frequencies, or keys without positions. Use"
        " merge_keys=rotated or merge_keys=values_only.",
        reason,
    )
