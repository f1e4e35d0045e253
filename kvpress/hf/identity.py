"""Which model a cache belongs to: a digest of everything that its keys and values depend on."""

from __future__ import annotations

import io
import json
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kvpress.errors import CacheError

_NEUTRAL = {"transformers_version", "name_or_path", "architectures", "use_cache", "id2label"}
_PLAIN = (bool, int, float, str, type(None))
_PIECE = 1 << 26  # bytes that are copied from another device at once
_WHOLE = 1 << 16  # bytes up to which a tensor is read whole at every call
_SAMPLE = 256  # elements of a larger one


class Identity:
    """The digest of a model: computed by the first call, and again as far as something changed.

    It covers the config, every byte of every parameter and buffer, those that are not saved as
    well, what lies inside tensor subclasses, scalings that modules keep as numbers, and which
    adapters are active, how they are scaled and whether they are merged. Adapters that are not
    active do not count, and neither do frequencies that a model computes anew from the length of
    each text.

    Later calls read again what has another storage or another version counter, what has no counter
    (tensors made in inference mode), and, since a change through `.data` or numpy moves no counter,
    tensors of up to 64 KiB and 256 elements of every larger one. Such a change that misses these
    elements is not seen: attach the engine anew after it. Neither model nor weights are kept alive.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._known: dict[tuple[Any, ...], tuple[Any, bytes]] = {}

    def __call__(self) -> str:
        """The digest. Raises CacheError if the model is gone or a weight cannot be read."""
        model = self._model()
        if model is None:
            raise CacheError(
                "The engine that made this cache is gone, and its model, which the cache must"
                " name. Save a cache while its engine exists."
            )
        known: dict[tuple[Any, ...], tuple[Any, bytes]] = {}  # marks, storages, digests
        digest = xxhash.xxh3_128(_config(model))
        for name, part in _parts(model):
            digest.update(name.encode())
            if isinstance(part, Tensor):
                mark = _mark(name, part)
                entry = known.get(mark) or self._known.get(mark)
                if entry is None or entry[0].expired() or part.is_inference():
                    storage = part.untyped_storage()
                    entry = StorageWeakRef(storage), _digest(part)  # type: ignore[no-untyped-call]
                known[mark] = entry
                digest.update(entry[1])
        self._known = known
        return digest.hexdigest()


def _mark(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """What tells whether a tensor is still the same. Raises CacheError if it cannot be read."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise CacheError(
            f"The weight {name} ({tensor.dtype}, {tensor.layout}, on {tensor.device}) has no bytes"
            " that can be read, so a file could not say which model a cache belongs to. Such a"
            " model can be used, but its caches cannot be saved."
        )
    version = None if tensor.is_inference() else tensor._version
    where = (tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor.device)
    what = (tensor.dtype, tuple(tensor.shape), tensor.stride())
    return (*where, *what, version, _sampled(tensor))


def _digest(tensor: Tensor) -> bytes:
    """The digest of all bytes, with their type and shape."""
    digest = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    for piece in _bytes(tensor):
        digest.update(piece)
    return digest.digest()


def _config(model: torch.nn.Module) -> bytes:
    """The config without fields that do not change what the model computes."""
    fields: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
    kept = {
        name: value
        for name, value in fields.items()
        if not name.startswith(("_", "output_", "return_")) and name not in _NEUTRAL
    }
    return json.dumps(kept, sort_keys=True, default=_text).encode()


def _parts(model: torch.nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Everything that counts, by name: plain tensors, and what has its value in its name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    state: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    declared: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    declared |= dict(model.named_buffers(remove_duplicate=False))
    left_out: set[str] = set()
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        left_out |= {prefix + name for name in _computed(module)}
        active = _active_adapters(module)
        left_out |= {prefix + name for name in _idle_adapters(module, active)}
        for name, value in _numbers(module, active):
            yield f"{prefix}{name}={value!r}", None
    beside = {name.rpartition(".")[0] for name in state.keys() - declared.keys()}
    for name, value in sorted((state | declared).items()):
        path, _, own = name.rpartition(".")
        if any(above in left_out for above in accumulate(name.split("."), "{}.{}".format)):
            continue
        if isinstance(value, Tensor) and value.device.type == "meta":
            value = _offloaded(modules.get(path), own, value)
        yield from _plain(name, value, path in beside or name in beside)


def _plain(name: str, value: Any, covered: bool) -> Iterator[tuple[str, Tensor | None]]:
    """The plain tensors inside a value; covered: whether its module shows the rest by itself."""
    if isinstance(value, Tensor):
        yield from _inside(name, value, covered)
    elif isinstance(value, _PLAIN):
        yield f"{name}={value!r}", None
    elif isinstance(value, bytes | bytearray | io.BytesIO):
        data = value.getvalue() if isinstance(value, io.BytesIO) else bytes(value)
        yield f"{name}={data.hex()}", None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _plain(f"{name}.{key}", item, covered)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _plain(f"{name}.{i}", item, covered)
    else:
        _refuse(name, value)


def _inside(name: str, tensor: Tensor, covered: bool) -> Iterator[tuple[str, Tensor | None]]:
    """A tensor itself, or the tensors that one of a subclass is made of."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        yield name, tensor.detach()
        return
    yield f"{name}:{type(tensor).__name__}", None
    if hasattr(tensor, "to_local"):  # a part, of which other processes have the rest
        yield f"{name} {tuple(tensor.shape)} {getattr(tensor, 'placements', ())}", None
        yield name, tensor.to_local().detach()
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        names, context = flatten()
        yield f"{name}={_text(context)}", None
        for inner in names:
            yield from _plain(f"{name}.{inner}", getattr(tensor, inner), covered)
        return
    hides = any(_holds_tensors(value) for value in vars(tensor).values())
    try:
        own = tensor.detach().as_subclass(Tensor)
        whole = own.untyped_storage().nbytes() >= own.nbytes
    except (RuntimeError, TypeError, NotImplementedError):  # as its class likes
        whole = False
    if not whole or (hides and not covered):
        _refuse(name, tensor)
    for field, value in sorted(vars(tensor).items()):
        if isinstance(value, _PLAIN) and not field.startswith("_") and value is not None:
            yield f"{name}.{field}={value!r}", None
    yield name, own


def _refuse(name: str, value: Any) -> None:
    raise CacheError(
        f"The weight {name} is a {type(value).__module__}.{type(value).__name__}, which does not"
        " show the numbers inside it, so a file could not say which model a cache belongs to. Such"
        " a model can be used, but its caches cannot be saved."
    )


def _holds_tensors(value: Any) -> bool:
    """Whether an attribute of a tensor is one, or an object that has some."""
    if isinstance(value, Tensor | torch.nn.Module):
        return isinstance(value, Tensor)
    return any(isinstance(inner, Tensor) for inner in getattr(value, "__dict__", {}).values())


def _numbers(module: torch.nn.Module, active: list[str] | None) -> Iterator[tuple[str, Any]]:
    """Scalings that a module keeps as plain numbers, and the state of its adapters."""
    for name, value in sorted(vars(module).items()):
        if name.endswith(("scaling", "scale")) and isinstance(value, int | float):
            yield name, value
    if active is None:
        return
    for name in ("disable_adapters", "merged_adapters"):
        yield name, getattr(module, name, None)
    yield "adapters", active
    for name in sorted(getattr(module, "other_param_names", ())):
        of_adapters = getattr(module, name, None)
        if isinstance(of_adapters, Mapping):
            values = [of_adapters[key] for key in active if key in of_adapters]
            yield name, [value for value in values if isinstance(value, _PLAIN)]


def _active_adapters(module: torch.nn.Module) -> list[str] | None:
    """The adapters that a module applies, or that are merged into it; None: it has no adapters."""
    if not hasattr(module, "adapter_layer_names"):
        return None
    active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None)
    names = [active] if isinstance(active, str) else list(active or ())
    merged = list(getattr(module, "merged_adapters", ()))
    if getattr(module, "disable_adapters", False):
        names = []
    return [*names, *(name for name in merged if name not in names)]


def _idle_adapters(module: torch.nn.Module, active: list[str] | None) -> Iterator[str]:
    """Where the weights of the other adapters of a module are."""
    if active is None:
        return
    for name in getattr(module, "adapter_layer_names", ()):
        container: Any = getattr(module, name, None)
        if hasattr(container, "keys"):  # a dict of modules or of parameters
            yield from (f"{name}.{key}" for key in container if key not in active)


def _computed(module: torch.nn.Module) -> Iterator[str]:
    """The frequencies that a rotary embedding computes anew from the length of each text."""
    kinds = getattr(module, "rope_type", None)
    of_layers = kinds if isinstance(kinds, Mapping) else {"": kinds}
    for layer, kind in of_layers.items():
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            yield f"{layer}_inv_freq".removeprefix("_")


def _offloaded(module: torch.nn.Module | None, name: str, tensor: Tensor) -> Any:
    """A weight from where accelerate keeps it while the module does not run."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        with suppress(KeyError):
            if weights is not None:
                return weights[name]
    return tensor


def _text(value: Any) -> str:
    """A description that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _sampled(tensor: Tensor) -> bytes:
    """The digest of a small tensor, or of some elements of a large one."""
    if tensor.nbytes > _WHOLE:
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        tensor = tensor.permute(order).reshape(-1)  # a view, unless there are gaps in it
        tensor = tensor[:: tensor.numel() // _SAMPLE]
    return _digest(tensor)


def _bytes(tensor: Tensor) -> Iterator[Any]:
    """The bytes of a tensor, in pieces on the host."""
    whole = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(whole), _PIECE):
        yield whole[start : start + _PIECE].cpu().numpy()
