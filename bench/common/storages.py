"""Bytes of whatever a cache keeps alive, counted the same way for every implementation.

This file needs nothing but torch: it also runs beside packages that share this one's import name.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch

_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.nn.Module)


def storage_bytes(cache: Any) -> int:
    """Bytes of all storages that can be reached from a cache, each counted once, whole.

    Attributes, slots, and the entries of containers are followed; models and code are not. A tensor
    that is a view counts with all of its storage, and one made of others with theirs.
    """
    storages = {}
    for tensor in _tensors(cache):
        storage = tensor.untyped_storage()
        storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(root: Any) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _CODE):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            inside = _parts(thing)
            if not inside:
                yield thing
            waiting += inside
        else:
            waiting += _inside(thing)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a wrapper is made of; none for a plain one."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return []
    return [value for value in vars(tensor).values() if isinstance(value, torch.Tensor)]


def _inside(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    slots = (getattr(thing, name, None) for cls in type(thing).__mro__ for name in _slots(cls))
    return [*getattr(thing, "__dict__", {}).values(), *slots]


def _slots(cls: type) -> tuple[str, ...]:
    named = cls.__dict__.get("__slots__", ())
    names = (named,) if isinstance(named, str) else tuple(named)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))
