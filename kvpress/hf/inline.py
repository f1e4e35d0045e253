"""Attention that a model computes by itself, step by step, instead of calling a function for it.

The cache hands such a model keys that stand for the stored ones. PyTorch asks them what to do with
every operation that they meet (`__torch_function__`): the scaling, biases and masks are noted, and
the product with the values is answered with the attention over the store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kvpress.errors import UnsupportedModelError


class Attends(Protocol):
    """Who attends in the end: queries `[B, N, Q, D]`, valid_BQ, scaling -> `[B, N, Q, E]`."""

    def __call__(self, query: Tensor, valid_BQ: Tensor | None, scaling: float) -> Tensor: ...


class Keys:
    """New keys `[B, H, Q, D]`, of which a model makes scores, however it lays them out.

    biased: whether the scores get a bias by distance (ALiBi), which `attends` adds itself.
    """

    def __init__(self, key: Tensor, biased: bool, attends: Attends) -> None:
        self.shape, self.dtype, self.device = key.shape, key.dtype, key.device
        self.biased, self.attends = biased, attends

    def transpose(self, *_: int) -> Keys:
        """Themselves."""
        return self

    reshape = view = transpose

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Scores:
        if function in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            query, keys = args
            return Scores(keys, query)
        if function is Tensor.baddbmm and kwargs:  # bias + alpha · query @ keys
            scores = Scores(kwargs["batch2"], kwargs["batch1"], kwargs.get("alpha", 1.0))
            return scores.biased(args[0])
        _refuse(function)


class Scores:
    """What becomes of the products of queries and keys, up to the product with the values."""

    def __init__(self, keys: Keys, query: Tensor, scaling: float = 1.0) -> None:
        self.dtype, self.device = query.dtype, query.device
        self._keys, self._query, self._scaling = keys, query, float(scaling)
        self._valid_BQ: Tensor | None = None

    def view(self, *_: Any, **__: Any) -> Scores:
        """Themselves: layout and dtype are for whoever attends to choose."""
        return self

    reshape = float = to = view

    def __mul__(self, factor: Any) -> Scores:
        if not isinstance(factor, int | float):
            _refuse("a product with a tensor")
        self._scaling *= factor
        return self

    def __truediv__(self, divisor: Any) -> Scores:
        if not isinstance(divisor, int | float):
            _refuse("a quotient by a tensor")
        self._scaling /= divisor
        return self

    def biased(self, bias: Any) -> Scores:
        """With a bias added: the mask of the engine's own mask function, ALiBi, or nothing."""
        if bias is None:
            return self
        if bias.dtype == torch.bool and bias.dim() == 2:
            self._valid_BQ = bias
        elif not self._keys.biased:
            _refuse("a bias")
        return self

    __add__ = biased

    def masked_fill(self, mask: Tensor, _: Any) -> Scores:
        """Notes the mask of the engine's own mask function."""
        if mask.dtype != torch.bool or mask.dim() != 2:
            _refuse("a mask of its own")
        return self.biased(mask)

    def __matmul__(self, _: Tensor) -> Tensor:
        batch, width = self._keys.shape[0], self._query.shape[-1]
        query_BNQD = self._query.reshape(batch, -1, self._query.shape[-2], width)
        valid_BQ = self._valid_BQ
        if valid_BQ is not None and bool(valid_BQ.all()):
            valid_BQ = None
        out_BNQE = self._keys.attends(query_BNQD, valid_BQ, self._scaling)
        return out_BNQE.reshape(*self._query.shape[:-1], out_BNQE.shape[-1])

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.matmul, torch.bmm):
            return args[0] @ args[1]
        idle = function is functional.dropout and not (kwargs or {}).get("training", True)
        if function is functional.softmax or idle:
            return args[0]
        _refuse(function)


def _refuse(what: Callable[..., Any] | str) -> NoReturn:
    name = what if isinstance(what, str) else getattr(what, "__name__", str(what))
    raise UnsupportedModelError(
        f"The model computes its attention with {name}, which this engine does not know there. In"
        " training mode call model.eval(); otherwise use another transformers or model."
    )
