"""A head that was trained on the target's own attention: `kvpress distill`.

One layer of queries and keys on the target's frozen embeddings. A layer that sees single tokens can
find neither what followed earlier occurrences of the present words nor what a passage is about;
so queries and keys are made of the last few tokens, each offset with weights of its own, and of the
mean of those farther back. A key that sees the tokens before its own answers a query of the same
tokens: that is an induction head without a layer below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import PolicyError
from kvpress.formulas.rotation import Rotation
from kvpress.hf.calibration import identity, model_name
from kvpress.hf.heads.base import check_columns, digest, floats, shape_of
from kvpress.hf.made_files import read_made
from kvpress.policy.heads import NOTHING
from kvpress.store import sealed

KIND = "retrieval head"
SUFFIX = "-retrieval.safetensors"  # of the files that ship
_HOW = "Make one for this model with kvpress distill."
_SLOWEST, _FASTEST = 2 * math.pi / 65536, 2 * math.pi / 512  # radians a token, of turned pairs


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a distilled head is built like.

    hidden: channels of an embedding. heads, group, width: see `RetrievalHead`. channels: of what is
    made of one token. window: last tokens with weights of their own. far: tokens before these, of
    which the mean is seen. pairs: of channels that turn with the position.
    """

    hidden: int
    heads: int
    group: int = 3
    width: int = 64
    channels: int = 128
    window: int = 6
    far: int = 26
    pairs: int = 8

    @property
    def reach(self) -> int:
        """Ids before a token that its query and key depend on."""
        return self.window - 1 + self.far

    @property
    def slots(self) -> int:
        """Parts that a query is made of."""
        return self.window + bool(self.far)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights."""
        seen, queries = self.slots * self.channels, self.heads * self.group
        return {
            "token": (self.channels, self.hidden),
            "token_bias": (self.channels,),
            "gate": (self.channels, self.hidden),
            "mixed": (self.channels, self.channels),
            "query": (queries * self.width, seen),
            "query_bias": (queries * self.width,),
            "key": (self.heads * self.width, seen),
            "key_bias": (self.heads * self.width,),
        }

    def rotation(self, device: torch.device | str = "cpu") -> Rotation:
        """The first channels turn, slowly: how far back a token is, never which one it is."""
        step = host.arange(self.pairs).float() / max(1, self.pairs - 1)
        return Rotation((_FASTEST * (_SLOWEST / _FASTEST) ** step).to(device))


def token_features(weights: Mapping[str, Tensor], embedded_BTX: Tensor) -> Tensor:
    """What is made of single tokens: `[B, T, C]`."""
    normed_BTX = normed(embedded_BTX)
    gate_BTC = torch.nn.functional.silu(normed_BTX @ weights["gate"].T)
    own_BTC = torch.nn.functional.linear(normed_BTX, weights["token"], weights["token_bias"])
    return own_BTC + gate_BTC @ weights["mixed"].T


def normed(embedded_BTX: Tensor) -> Tensor:
    """Embeddings whose channels have a mean square of 1."""
    return embedded_BTX * embedded_BTX.square().mean(-1, keepdim=True).add(1e-12).rsqrt()


def windows(sizes: Sizes, token_BTC: Tensor) -> Tensor:
    """The last tokens of each one side by side, and the mean of those before: `[B, Q, X]`."""
    count = token_BTC.shape[1] - sizes.reach
    ends = [token_BTC[:, sizes.reach - back :][:, :count] for back in range(sizes.window)]
    if sizes.far:
        # No difference of running sums: its rounding would depend on all tokens before.
        before_BCT = token_BTC[:, : count + sizes.far - 1].transpose(1, 2)
        mean_BCQ = torch.nn.functional.avg_pool1d(before_BCT, sizes.far, stride=1)
        ends.append(mean_BCQ.transpose(1, 2) * math.sqrt(sizes.far))
    return torch.cat(ends, dim=-1)


def projected(
    weights: Mapping[str, Tensor],
    seen_BQX: Tensor,
    position_BQ: Tensor,
    part: str,
    width: int,
    rotation: Rotation,
) -> Tensor:
    """Queries or keys of so many channels, turned: `[B, heads, Q, D]`."""
    flat_BQX = torch.nn.functional.linear(seen_BQX, weights[part], weights[f"{part}_bias"])
    x_BNQD = torch.unflatten(flat_BQX, -1, (-1, width)).transpose(1, 2)
    return rotation.turn(x_BNQD, position_BQ[:, None].expand(x_BNQD.shape[:3]))


@dataclass(frozen=True, kw_only=True, eq=False)
class DistilledHead:
    """Trained weights, in fp32, and the embedding of the target."""

    sizes: Sizes
    weights: Mapping[str, Tensor]
    rotation: Rotation
    embedding: Any
    fingerprint: str

    @property
    def heads(self) -> int:
        """See `RetrievalHead`."""
        return self.sizes.heads

    @property
    def width(self) -> int:
        """See `RetrievalHead`."""
        return self.sizes.width

    @property
    def group(self) -> int:
        """See `RetrievalHead`."""
        return self.sizes.group

    @property
    def reach(self) -> int:
        """See `RetrievalHead`."""
        return self.sizes.reach

    @property
    def nbytes(self) -> int:
        """See `RetrievalHead`."""
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def floats(self) -> int:
        """See `RetrievalHead`. Of single tokens there are up to six copies, then their windows."""
        return floats(self.sizes.hidden, self) + (self.sizes.slots + 6) * self.sizes.channels

    @torch.no_grad()
    def project(self, id_BT: Tensor, position_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """See `RetrievalHead`."""
        check_columns(id_BT, position_BQ, self.reach)
        token_BTC = token_features(self.weights, self.embedding(id_BT.clamp_min(0)).float())
        seen_BQX = windows(self.sizes, token_BTC * (id_BT != NOTHING)[..., None])
        query, key = (
            projected(self.weights, seen_BQX, position_BQ, part, self.width, self.rotation)
            for part in ("query", "key")
        )
        return query, key


def head_of(sizes: Sizes, weights: Mapping[str, Tensor], model: Any) -> DistilledHead:
    """The head of a target with these weights, on its device."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    found = {name: x.detach().to(device, torch.float32) for name, x in weights.items()}
    mark = f"distilled:{digest(repr(sizes), found)}:{identity(model)}"
    return DistilledHead(
        sizes=sizes,
        weights=found,
        rotation=sizes.rotation(device),
        embedding=embedding,
        fingerprint=mark,
    )


class Trained(NamedTuple):
    """What a file holds. tensors: weights in bf16, or all that an unfinished training goes on from.

    training: what it was trained on, and how. done: steps that were taken.
    """

    tensors: Mapping[str, Tensor]
    sizes: Sizes
    training: dict[str, Any]
    done: int
    finished: bool


def write(path: str | Path, model: Any, made: Trained) -> None:
    """Writes a head, whole or not at all; one that is finished in bf16."""
    facts = {
        "kind": KIND,
        "weights": identity(model),
        "model": model_name(model),
        "words": _words(model),
        "sizes": asdict(made.sizes),
        **{name: getattr(made, name) for name in Trained._fields[2:]},
    }
    tensors = made.tensors
    if made.finished:
        tensors = {name: x.detach().to(torch.bfloat16) for name, x in tensors.items()}
    sealed.write(path, tensors, facts, private=False)


def read(path: str | Path, model: Any) -> Trained:
    """What is in a file. Raises PolicyError where it is damaged, or of another target."""
    facts, tensors = read_made("head", path, "a retrieval head", _HOW)
    if facts.get("kind") != KIND:
        raise PolicyError(f"head={path} is no retrieval head, but {facts.get('kind')!r}. {_HOW}")
    sizes = _sizes(path, facts.get("sizes"))
    heads, _, hidden = shape_of(model)
    for what, theirs, ours in (
        ("words of the vocabulary", facts.get("words"), _words(model)),
        ("channels of an embedding", sizes.hidden, hidden),
        ("KV heads", sizes.heads, heads),
        ("the weights", facts.get("weights"), identity(model)),
    ):
        if theirs != ours:
            raise PolicyError(
                f"head={path} was made for {facts.get('model')!r} with {what}: {theirs}; here it"
                f" is {ours}. {_HOW}"
            )
    rest: list[Any] = [facts.get(name) for name in Trained._fields[2:]]
    finite = all(bool(x.float().isfinite().all()) for x in tensors.values())
    if [type(x) for x in rest] != [dict, int, bool] or not finite:
        raise PolicyError(
            f"head={path} has a right checksum, but what is in it cannot be a head. {_HOW}"
        )
    return Trained(dict(tensors), sizes, *rest)


def load(path: str | Path, model: Any) -> DistilledHead:
    """The head in a file. Raises PolicyError: damaged, unfinished, or of another target."""
    found = read(path, model)
    if not found.finished:
        raise PolicyError(
            f"head={path} is unfinished: {found.done} steps were taken. Run kvpress distill with"
            " the same options again; it goes on from there."
        )
    shapes = {name: tuple(x.shape) for name, x in found.tensors.items()}
    if shapes != found.sizes.shapes():
        raise PolicyError(f"head={path} has weights {shapes}, not {found.sizes.shapes()}. {_HOW}")
    return head_of(found.sizes, found.tensors, model)


def _words(model: Any) -> int:
    words: int = model.get_input_embeddings().weight.shape[0]
    return words


def _sizes(path: str | Path, given: Any) -> Sizes:
    names = [field.name for field in fields(Sizes)]
    whole = isinstance(given, dict) and all(type(x) is int and x >= 0 for x in given.values())
    if not whole or sorted(given) != sorted(names):
        raise PolicyError(f"head={path} has sizes {given}; a head has {', '.join(names)}. {_HOW}")
    return Sizes(**given)
