"""Latent attention (MLA): a token is one latent vector, from which keys and values of heads follow.

transformers caches the latents, and expands them for every head before attention. Here queries are
brought to the latents instead, and outputs back from them, so that what is stored is never
expanded: q · (W_K c) = (W_Kᵀ q) · c, and Σ a (W_V c) = W_V Σ a c. All query heads then share one
row of keys, a latent beside what turns by its position, of which the latent is the value.

MLA: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kvpress.errors import UnsupportedModelError
from kvpress.types import LayerKind

_PROJECTION = "kv_b_proj"  # of modules that expand latents
_REASON = "latent attention (MLA) of which the weights that expand it cannot be read"


class Updated(threading.local):
    """What the tensors do not show that attention is given next, in this thread.

    shared: whether a layer took keys that others are to read in this pass.
    """

    shared = False
    _layer: Callable[[], Any] | None = None  # weak: it must not keep a cache

    def took(self, layer: Any) -> None:
        """Says which layer took latents, for which attention comes next."""
        self._layer = weakref.ref(layer)

    def take(self) -> Any:
        """That layer, once; None: no latents wait."""
        found, self._layer = self._layer, None
        return None if found is None else found()

    def forget(self) -> None:
        """Forgets what a pass left behind."""
        self._layer, self.shared = None, False


UPDATED = Updated()


def is_latent(config: Any) -> bool:
    """Whether the layers of a config cache latents."""
    return bool(getattr(config, "kv_lora_rank", None))


def kind_of(index: int, config: Any) -> LayerKind:
    """The kind of a layer of latent attention."""
    rank, turned = config.kv_lora_rank, config.qk_rope_head_dim
    queries = config.num_attention_heads
    return LayerKind(index, 1, queries=queries, width=rank + turned, latent=rank)


def check_modules(name: str, model: Any, kinds: tuple[LayerKind, ...]) -> None:
    """Raises UnsupportedModelError where the latents of a layer cannot be expanded afterwards."""
    wanted = {kind.index for kind in kinds if kind.latent}
    if not wanted:
        return
    modules = [module for module in model.modules() if hasattr(module, _PROJECTION)]
    plain = {x.layer_idx for x in modules if _is_plain(getattr(x, _PROJECTION))}
    if wanted - plain:
        raise UnsupportedModelError(
            f"The model {name!r} has {_REASON} (layers {sorted(wanted - plain)}), which this engine"
            f" does not support. Allowed: attention whose {_PROJECTION} is a plain linear layer"
            " without bias. Use weights that are neither quantised nor wrapped.",
            _REASON,
        )


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and module.bias is None


def joined(latent_B1QC: Tensor, turned_B1QC: Tensor) -> Tensor:
    """Keys: latents, and behind them what turns by positions."""
    return torch.cat([latent_B1QC, turned_B1QC], dim=-1)


def to_latents(module: Any, query_BNQD: Tensor, rank: int) -> Tensor:
    """Queries that attend to latents: `[B, N, Q, rank + turned]`."""
    straight = module.qk_nope_head_dim
    weight_NXC = _by_head(module, query_BNQD.shape[1], rank)[:, :straight]
    own_BNQC = torch.matmul(query_BNQD[..., :straight], weight_NXC)
    return torch.cat([own_BNQC, query_BNQD[..., straight:]], dim=-1)


def from_latents(module: Any, out_BNQC: Tensor) -> Tensor:
    """Outputs of heads `[B, N, Q, E]` from what they are in latents."""
    weight_NXC = _by_head(module, out_BNQC.shape[1], out_BNQC.shape[3])
    return torch.matmul(out_BNQC, weight_NXC[:, module.qk_nope_head_dim :].mT)


def _by_head(module: Any, heads: int, rank: int) -> Tensor:
    """What expands latents to keys, then values, of every head: `[N, D − turned + E, rank]`."""
    weight: Tensor = getattr(module, _PROJECTION).weight
    return weight.view(heads, -1, rank)
