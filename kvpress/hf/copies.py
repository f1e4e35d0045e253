"""Copies and pickles of a model with an engine attached: plain models without one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def copied_plain(
    module: torch.nn.Module,
    hooks: Iterable[int],
    own: Iterable[str],
    restore: Callable[[torch.nn.Module], None],
) -> None:
    """Makes `copy.deepcopy` and pickle of a module leave out what the engine put there.

    hooks: the ids of its forward hooks. own: names of attributes of the instance; `forget` removes
    those that this function adds. restore: puts a copy's attention back. Both protocols look at the
    instance before its class, so that nothing is changed for other models.
    """
    left_out, hooks = {*own, *_ADDED}, frozenset(hooks)

    def deepcopy(memo: dict[int, Any]) -> torch.nn.Module:
        twin = type(module).__new__(type(module))
        memo[id(module)] = twin
        state = {name: value for name, value in vars(module).items() if name not in left_out}
        for name in _HOOKS:
            kept = {key: hook for key, hook in state[name].items() if key not in hooks}
            state[name] = type(state[name])(kept)
        twin.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        restore(twin)
        return twin

    def reduce(protocol: int) -> Any:
        tensors = chain(module.parameters(), module.buffers())
        twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})  # shares them
        return twin.__reduce_ex__(protocol)

    vars(module).update(__deepcopy__=deepcopy, __reduce_ex__=reduce)


def forget(module: torch.nn.Module) -> None:
    """Removes what `copied_plain` added."""
    for name in _ADDED:
        vars(module).pop(name, None)


_ADDED = ("__deepcopy__", "__reduce_ex__")
