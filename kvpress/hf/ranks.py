"""A model that transformers divided among processes: who they are, and which heads are here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpress.errors import AttachError, UnsupportedModelError
from kvpress.hf.support import Fingerprint
from kvpress.parallel import ALONE, Ranks, joined, timeout
from kvpress.types import LayerKind

_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")
_KEYS = ("k_proj", *_FUSED)
_QUERIES = ("q_proj", "q_b_proj", *_FUSED)
_PARTS = {"q_proj": "colwise_gather_output", "k_proj": "colwise_gather_output"}
_PARTS |= {"v_proj": "colwise_gather_output", "o_proj": "rowwise_split_input"}


def ranks_of(model: Any, seconds: float | None = None) -> Ranks:
    """The processes that hold this model together; from now on their silence has an end.

    seconds: until then. Raises UnsupportedModelError for a model whose layers are divided.
    """
    size = getattr(model, "_tp_size", None) or 1
    mesh: Any = getattr(model, "_device_mesh", None)
    names = () if mesh is None else mesh.mesh_dim_names or ()
    layers = mesh.size(names.index("pp")) if "pp" in names else 1
    if layers > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has its layers in {layers} processes (pp_size={layers}), and a"
            " cache needs all layers. Load it with DistributedConfig(tp_size=N), which divides the"
            " heads of every layer."
        )
    if mesh is None or size == 1:
        return ALONE
    group = mesh.get_group("tp") if "tp" in names else mesh.get_group()
    device = next(model.parameters()).device
    return joined(group, device, timeout(seconds))


def divided(model: Any, shape: Fingerprint, ranks: Ranks) -> Fingerprint:
    """The layers with the heads that this process has.

    Raises UnsupportedModelError, with numbers and what to load the model with, where heads do not
    divide or queries are without their keys.
    """
    if ranks.alone:
        return shape
    queries, keys = _queries_and_keys(model)
    if not keys and not queries:
        return shape
    if keys != queries or any(kind.latent for kind in shape.kinds):
        raise UnsupportedModelError(
            f"{type(model).__name__} has the queries of its attention in {ranks.size} processes,"
            f" and all keys in each of them. {_remedy(model)}",
            "queries without their keys",
        )
    return shape._replace(kinds=tuple(_part(model, kind, ranks) for kind in shape.kinds))


def refuse_parts(model: Any) -> None:
    """Raises AttachError where a plan for one process was asked for a model that several hold."""
    size = getattr(model, "_tp_size", None) or 1
    if size > 1:
        raise AttachError(
            f"memory= plans for one process, but {size} hold this model together, and might choose"
            ' differently. Give all of them the same policy, such as "name:budget=0.5".'
        )


def parts_of(model: Any) -> int:
    """Into how many parts the heads of a model are divided; 1: each process has all of them."""
    parts: int = getattr(model, "_tp_size", None) or 1
    return parts if parts > 1 and all(_queries_and_keys(model)) else 1


def _queries_and_keys(model: Any) -> tuple[bool, bool]:
    return _divides(model, _QUERIES), _divides(model, _KEYS)


def _divides(model: Any, names: tuple[str, ...]) -> bool:
    """Whether each process has some of what these projections make."""
    rules = model.tp_plan.items()
    return any(key.rpartition(".")[2] in names and style == "colwise" for key, style in rules)


def _part(model: Any, kind: LayerKind, ranks: Ranks) -> LayerKind:
    """A layer with the heads of this process."""
    for count, what in ((kind.heads, "KV heads"), (kind.queries, "query heads")):
        if count % ranks.size:
            raise UnsupportedModelError(
                f"Layer {kind.index} of {type(model).__name__} has {count} {what}, which"
                f" {ranks.size} processes cannot share evenly. {_remedy(model)}",
                "heads that do not divide",
            )
    heads, queries = kind.heads // ranks.size, kind.queries // ranks.size
    slopes = kind.slopes and kind.slopes[ranks.rank * queries : (ranks.rank + 1) * queries]
    made = replace(kind, heads=heads, queries=queries, slopes=slopes)
    return replace(made, first=ranks.rank * heads, whole=kind.heads)


def _remedy(model: Any) -> str:
    """How a model is loaded so that each process has the attention as a whole."""
    known = {key.rpartition(".")[2]: key.rpartition(".")[0] for key in model.tp_plan}
    where = next((known[part] for part in _PARTS if part in known), None)
    if where is None or not _PARTS.keys() <= known.keys():
        return "Load it with fewer processes, or in one."
    rules = {f"{where}.{part}": style for part, style in _PARTS.items()}
    return (
        "Use a number of processes that divides them, or let each process have all of the"
        " attention, and so all keys and values: from_pretrained(...,"
        f" distributed_config=DistributedConfig(tp_size=N, tp_plan={rules}))."
    )


def own_part(weight: Tensor, columns: int) -> Tensor:
    """The columns of a weight that belong to the heads of this process: all, or its part."""
    if not hasattr(weight, "to_local"):
        return weight
    local: Tensor = weight.to_local()
    whole: Any = weight
    return local if local.shape[-1] == columns else whole.full_tensor()


def whole(weight: Any) -> Tensor:
    """A weight, of which each process may have a part; all of them ask for it together."""
    made: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return made if type(made) is torch.Tensor else made.detach()
