"""The draft layer of an EAGLE-3 checkpoint as a retrieval head (arXiv 2512.00722).

What is kept of it: the embedding, its norm, and the query and key projection. An EAGLE-3 layer
projects the normed embedding of a token, and behind it hidden states of the target that a head
which runs before the target cannot have: of both projections the columns of the embedding are
taken, and the others are left out. `d2t`, `t2d`, values, feed-forward and LM head are not read.
Beyond the positions that the draft was trained on, its rotary embedding is extended as YaRN has it.

EAGLE-3: Li et al., arXiv 2503.01840.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpress.errors import PolicyError
from kvpress.formulas.rotation import Rotation
from kvpress.hf.calibration import identity
from kvpress.hf.heads.base import check_columns, digest, floats, shape_of
from kvpress.hf.heads.yarn import frequencies

_EMBEDDING, _NORM = "embed_tokens.weight", "midlayer.input_layernorm.weight"
_QUERY, _KEY = (f"midlayer.self_attn.{part}_proj.weight" for part in "qk")
_PLAIN = (None, "default")
_TRAINED = 2048  # positions of a draft whose config does not say


@dataclass(frozen=True, kw_only=True, eq=False)
class Eagle3Head:
    """Weights in fp32; the embedding in its own dtype, or the target's."""

    embedding_YX: Tensor
    norm_X: Tensor
    eps: float
    query: Tensor  # [N · D, X]
    key: Tensor  # [H · D, X]
    rotation: Rotation
    scale: float
    heads: int
    width: int
    group: int
    fingerprint: str
    nbytes: int
    reach: int = 0

    @property
    def floats(self) -> int:
        """See `RetrievalHead`."""
        return floats(self.norm_X.shape[0], self)

    @torch.no_grad()
    def project(self, id_BT: Tensor, position_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """See `RetrievalHead`."""
        check_columns(id_BT, position_BQ, self.reach)
        embedded_BQX = self.embedding_YX[id_BT.clamp_min(0)].float()
        mean_BQ1 = embedded_BQX.square().mean(-1, keepdim=True)
        normed_BQX = embedded_BQX * torch.rsqrt(mean_BQ1 + self.eps) * self.norm_X
        query, key = (self._turned(normed_BQX @ x.T, position_BQ) for x in (self.query, self.key))
        return query, key

    def _turned(self, flat_BQX: Tensor, position_BQ: Tensor) -> Tensor:
        x_BNQD = torch.unflatten(flat_BQX, -1, (-1, self.width)).transpose(1, 2) * self.scale
        return self.rotation.turn(x_BNQD, position_BQ[:, None].expand(x_BNQD.shape[:3]))


def load(path: Path, model: Any) -> Eagle3Head:
    """The head of a checkpoint: a folder, or a safetensors file that config.json lies beside.

    Raises PolicyError where something is missing or does not fit the target.
    """
    config = _config(path)
    tensors = _tensors(path)
    target = model.get_input_embeddings().weight
    embedding_YX = tensors.pop(_EMBEDDING, target)
    heads, queries, hidden = shape_of(model)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    own = config["num_attention_heads"], config["num_key_value_heads"]
    _check(
        path,
        ("channels of an embedding", config["hidden_size"], hidden),
        ("KV heads", own[1], heads),
        ("query heads", own[0], queries),
        ("words of the vocabulary", embedding_YX.shape[0], target.shape[0]),
        ("shape of the embedding", list(embedding_YX.shape[1:]), [hidden]),
        ("shape of the norm", list(tensors[_NORM].shape), [hidden]),
        ("shape of q_proj", list(tensors[_QUERY].shape), [own[0] * width, 2 * hidden]),
        ("shape of k_proj", list(tensors[_KEY].shape), [own[1] * width, 2 * hidden]),
    )
    where = target.device
    half = {name: tensors[name][:, :hidden].to(where, torch.float32) for name in (_QUERY, _KEY)}
    turning, scale = _turning(path, config, width, model)
    own_X = [embedding_YX] if embedding_YX is not target else []
    own_X += [tensors[_NORM].float(), *half.values()]
    return Eagle3Head(
        embedding_YX=embedding_YX.detach().to(where),
        norm_X=tensors[_NORM].to(where, torch.float32),
        eps=config.get("rms_norm_eps", 1e-6),
        query=half[_QUERY],
        key=half[_KEY],
        rotation=turning,
        scale=scale,
        heads=heads,
        width=width,
        group=own[0] // own[1],
        nbytes=sum(x.nbytes for x in own_X),
        fingerprint=f"eagle3:{digest(json.dumps(config, sort_keys=True), tensors)}"
        f":{identity(model)}",
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    """What a head needs of a checkpoint; perhaps without an embedding. Raises PolicyError."""
    tensors = dict(_read(path, (_EMBEDDING, _NORM, _QUERY, _KEY)))
    missing = [name for name in (_NORM, _QUERY, _KEY) if name not in tensors]
    if missing:
        raise PolicyError(
            f"head={path} has no {', '.join(missing)}: it is no EAGLE-3 checkpoint. Give a folder"
            " with safetensors of one, or a file of kvpress distill."
        )
    return tensors


def _check(path: Path, *facts: tuple[str, Any, Any]) -> None:
    """Raises PolicyError for the first fact of a checkpoint that is not the target's."""
    for what, theirs, ours in facts:
        if theirs != ours:
            raise PolicyError(
                f"head={path}: {what} of this EAGLE-3 checkpoint: {theirs}; the target needs"
                f" {ours}. Give a draft that was made for this model and its tokenizer."
            )


def _config(path: Path) -> dict[str, Any]:
    """What config.json says. Raises PolicyError."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PolicyError(f"head={path}: {file} cannot be read: {error}.") from error
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    whole = isinstance(found, dict) and all(
        type(found.get(name)) is int and found[name] > 0 for name in names
    )
    if not whole:
        raise PolicyError(f"head={path}: {file} must give {', '.join(names)} as whole numbers.")
    return dict(found)


def _read(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of some names, whatever stands before them. Raises PolicyError."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - it is no dict
                    for name in names:
                        if key == name or key.endswith(f".{name}"):
                            yield name, opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise PolicyError(f"head={file} cannot be read as safetensors: {error}.") from error


def _turning(path: Path, config: dict[str, Any], width: int, model: Any) -> tuple[Rotation, float]:
    """How queries and keys turn, and their scale, for as many positions as the target has."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in _PLAIN:
        raise PolicyError(
            f"head={path}: its rotary embedding is of the type {kind!r}; it is extended by YaRN"
            " from a plain one alone. Allowed: default."
        )
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    trained = config.get("max_position_embeddings") or _TRAINED
    ours = model.config.get_text_config(decoder=True)
    wanted = getattr(ours, "max_position_embeddings", None) or trained
    frequency_F, scale = frequencies(width, theta, wanted / trained, trained)
    return Rotation(frequency_F.to(model.get_input_embeddings().weight.device)), scale
