"""The target's own attention as a retrieval head: no weights are needed.

Of layer 0 queries and keys follow from ids alone, and its head is exact: the keys are those that
the target's cache holds. A later layer gets the embeddings of tokens instead of what the layers
before it would make of them: what it looks at then is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import PolicyError
from kvpress.formulas.rotation import Rotation
from kvpress.hf.calibration import identity
from kvpress.hf.heads.base import check_columns, floats, shape_of
from kvpress.hf.ranks import parts_of
from kvpress.hf.rotation_probe import rotations

NAME = "self"
_PROBED = 24  # ids that the keys of layer 0 are compared for
_STRIDE = 7919  # a prime: from one of them to the next
_ULPS = 64  # of the largest key that two ways of computing it may differ by


@dataclass(frozen=True, kw_only=True, eq=False)
class SelfHead:
    """Embedding, input norm, and query and key projection of one layer of the target."""

    embedding: Any
    norm: Any  # None where a layer has none before its attention
    attention: Any
    rotation: Rotation | None
    heads: int
    width: int
    group: int
    fingerprint: str
    reach: int = 0
    nbytes: int = 0  # they are the target's

    @property
    def floats(self) -> int:
        """See `RetrievalHead`."""
        return floats(self.embedding.weight.shape[-1], self)

    @torch.no_grad()
    def project(self, id_BT: Tensor, position_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """See `RetrievalHead`."""
        check_columns(id_BT, position_BQ, self.reach)
        hidden_BQX = self.embedding(id_BT.clamp_min(0))
        if self.norm is not None:
            hidden_BQX = self.norm(hidden_BQX)
        return self._part("q", hidden_BQX, position_BQ), self._part("k", hidden_BQX, position_BQ)

    def _part(self, part: str, hidden_BQX: Tensor, position_BQ: Tensor) -> Tensor:
        """Queries or keys, normed where the layer norms them, and turned."""
        flat_BQX = getattr(self.attention, f"{part}_proj")(hidden_BQX)
        norm: Any = getattr(self.attention, f"{part}_norm", None)
        whole = norm is not None and norm.weight.shape[0] != self.width  # of all heads at once
        if whole:
            flat_BQX = norm(flat_BQX)
        x_BQND = torch.unflatten(flat_BQX, -1, (-1, self.width))
        if norm is not None and not whole:
            x_BQND = norm(x_BQND)
        x_BNQD: Tensor = x_BQND.transpose(1, 2).float()
        if self.rotation is None:
            return x_BNQD
        return self.rotation.turn(x_BNQD, position_BQ[:, None].expand(x_BNQD.shape[:3]))


def load(model: Any, layer: int = 0) -> SelfHead:
    """The head of a layer, for a model that no engine is attached to.

    Raises PolicyError where there is no such layer, or what layer 0 makes of ids cannot be computed
    from its parts; UnsupportedModelError where nobody knows how keys turn.
    """
    name, layers = f"{NAME}@{layer}", getattr(model.base_model, "layers", [])
    if len(layers) and not 0 <= layer < len(layers):
        raise PolicyError(
            f"head={name}: {type(model).__name__} has layers 0 to {len(layers) - 1}."
            f" Give {NAME}, which is layer 0."
        )
    first = layers[layer] if len(layers) else None
    attention = getattr(first, "self_attn", None)
    if not all(hasattr(attention, f"{part}_proj") for part in "qk"):
        raise PolicyError(
            f"head={name}: the attention of {type(model).__name__} has no q_proj and k_proj to run"
            " beforehand. Use a head of another kind."
        )
    heads, queries, hidden = shape_of(model)
    width = getattr(attention, "head_dim", None) or hidden // queries
    here = parts_of(model)
    heads, queries = heads // here, queries // here
    made = SelfHead(
        embedding=model.get_input_embeddings(),
        norm=getattr(first, "input_layernorm", None),
        attention=attention,
        rotation=rotations(model)[layer],
        heads=heads,
        width=width,
        group=queries // heads,
        fingerprint=f"{NAME}@{layer}:{identity(model)}",
    )
    id_11 = host.zeros(1, 1).to(made.embedding.weight.device)
    asking, keeping = (x.shape[1] for x in made.project(id_11, id_11))
    if (asking, keeping) != (queries, heads):
        raise PolicyError(
            f"head={name}: layer {layer} has {asking} query heads and {keeping} KV heads, the"
            f" layers that keep all tokens {queries} and {heads}. Give another layer."
        )
    if layer == 0:
        _prove(made, model)
    return made


def _prove(head: SelfHead, model: Any) -> None:
    """Raises PolicyError where the head's keys are not those of the target's layer 0."""
    words = model.config.get_text_config(decoder=True).vocab_size
    device = model.get_input_embeddings().weight.device
    id_1T = (host.arange(_PROBED) * _STRIDE % words)[None].to(device)
    with torch.no_grad():
        out = model(id_1T, use_cache=True, return_dict=True)
    cache = next((out[name] for name in ("cache", "past_key_values") if name in out), None)
    true_1HTD = cache.layers[0].keys if cache is not None else None
    kept = _PROBED if true_1HTD is None else true_1HTD.shape[2]  # fewer of a sliding layer
    key_1HTD = head.project(id_1T, host.arange(_PROBED)[None].to(device))[1][:, :, -kept:]
    if true_1HTD is not None and true_1HTD.shape == key_1HTD.shape:
        most = float(true_1HTD.abs().max()) * torch.finfo(true_1HTD.dtype).eps * _ULPS
        wrong = float((true_1HTD.float() - key_1HTD).abs().max())
        if wrong <= most:
            return
        how = f"they differ by {wrong:.3g}, and {most:.3g} is rounding"
    else:
        there = None if true_1HTD is None else list(true_1HTD.shape)
        how = f"shapes are {list(key_1HTD.shape)} and {there}"
    raise PolicyError(
        f"head={NAME}: what embedding, norm and key projection make of ids is not what layer 0 of"
        f" {type(model).__name__} keeps: {how}. Use a head of another kind."
    )
