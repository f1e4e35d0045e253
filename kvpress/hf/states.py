"""What layers hold besides keys and values: the states of recurrences and convolutions.

transformers' own layers of a cache hold them, models read and write them in place. No stage sees
them, and no policy compresses them; they follow the sequences of a cache wherever these go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import LinearAttentionLayer

from kvpress.errors import CacheError, CacheFileError, UnsupportedModelError
from kvpress.hf.cache_layer import EngineLayer
from kvpress.hf.chunked import ChunkedLayer
from kvpress.hf.support import Fingerprint
from kvpress.host import lasting
from kvpress.pipe.state.context import Context
from kvpress.pipe.state.layer import Layer
from kvpress.types import LayerKind, StateKind

# Of such a layer: number of a state -> tensor.
_TABLES = ("conv_states", "recurrent_states", "columns")


class HybridLayer(EngineLayer, LinearAttentionLayer):  # type: ignore[no-untyped-call]
    """A layer whose keys and values an engine holds, and whose states transformers does."""

    def __init__(self, kind: LayerKind, context: Context, count: int) -> None:
        EngineLayer.__init__(self, kind, context)
        LinearAttentionLayer.__init__(self, count)

    # Keys come by `update`, which prepares their store: this one prepares states alone.
    lazy_initialization = LinearAttentionLayer.lazy_initialization  # type: ignore[assignment]


class Idle(NamedTuple):
    """Sequences without a token in a pass, and their states before it."""

    index_b: Tensor
    states: list[Tensor]


class States:
    """The states of all layers of one cache."""

    def __init__(self, layers: Mapping[int, Any]) -> None:
        self._layers = layers
        self._before: list[Any] | None = None  # stamps, while a forward pass is under way
        self._idle: Idle | None = None  # what sequences keep that have no token in it

    def _tensors(self) -> Iterator[tuple[int, str, int, Tensor]]:
        """Layer, table, number of the state, tensor `[B, ...]`."""
        for index, layer in self._layers.items():
            for table in _TABLES:
                for i, tensor in getattr(layer, table, {}).items():
                    if tensor is not None:
                        yield index, table, i, tensor

    def __bool__(self) -> bool:
        """Whether there are layers with states."""
        return bool(self._layers)

    @property
    def chunked(self) -> bool:
        """Whether some attend within chunks, which are counted in columns."""
        return any(isinstance(layer, ChunkedLayer) for layer in self._layers.values())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.untyped_storage().nbytes() for *_, x in self._tensors())

    @property
    def croppable(self) -> bool:
        """Whether they can go back: convolutions can, if what they forget was recorded."""
        recorded = all(layer.record_past for layer in self._layers.values())
        return recorded and all(table != "recurrent_states" for _, table, _, _ in self._tensors())

    def select(self, index: Sequence[int]) -> None:
        """Sequence i becomes what sequence `index[i]` was."""
        self._before = self._before if self.torn else None
        for layer, table, i, tensor in list(self._tensors()):
            index_B = torch.tensor(index, dtype=torch.int64, device=tensor.device)
            getattr(self._layers[layer], table)[i] = tensor.index_select(0, index_B)

    def clear(self) -> None:
        """Forgets them; a batch of another size may come."""
        self._before = None
        for layer in self._layers.values():
            if isinstance(layer, ChunkedLayer):
                layer.forget()
            else:
                LinearAttentionLayer.__init__(layer, layer.number_of_states)

    def copy_from(self, other: States) -> None:
        """Becomes what the other ones are. Models write in place: nothing is shared."""
        self._before = None
        for index, layer in self._layers.items():
            for name in getattr(layer, "COPIED", _PLAIN):
                setattr(layer, name, _copied(getattr(other._layers[index], name)))

    def kept(self) -> States:
        """What they are now."""
        kept = States({i: _blank(layer) for i, layer in self._layers.items()})
        kept.copy_from(self)
        return kept

    def record(self, on: bool) -> None:
        """Says whether tokens to come may be taken back; what could be becomes final."""
        self.settle()
        for layer in self._layers.values():
            layer.record_past = on

    def settle(self) -> None:
        """Lets what could be taken back become final."""
        for layer in self._layers.values():
            if layer.record_past:
                _trim(layer, 0)

    def check_crop(self, tokens: int) -> None:
        """Raises CacheError where the last tokens cannot be taken back."""
        if tokens and not self.croppable:
            raise CacheError(
                f"{tokens} tokens are to be taken back, but this model has layers of linear"
                " attention, of which the state no longer holds what was before them. Decode"
                " without drafts (assistant_model, prompt_lookup_num_tokens), or fork the cache"
                " before tokens that may go: cache.fork()."
            )

    def crop(self, tokens: int) -> None:
        """Takes back the last tokens."""
        for layer in self._layers.values():
            _trim(layer, tokens)

    @lasting
    def begin(self, idle_B: Tensor | None) -> None:
        """Notes how they are before a forward pass.

        idle_B: which sequences have no token in it, as after their end: models would go on with
        padding, so that their states are put back in the end. None: none.
        """
        for layer, table, i, tensor in list(self._tensors()):
            if tensor.is_inference():  # cannot be written to outside, nor counts how often it was
                getattr(self._layers[layer], table)[i] = tensor.clone()
        self._before, self._idle = self._stamps(), None
        if idle_B is not None and bool(idle_B.any()):
            index_b = idle_B.nonzero().flatten()
            held = [x for x in self._tensors() if x[1] != "columns"]
            self._idle = Idle(index_b, [x[index_b.to(x.device)].clone() for *_, x in held])

    def end(self) -> None:
        """Says that the pass is over. Raises UnsupportedModelError if a layer holds no state."""
        began, self._before = self._before, None
        idle, self._idle = self._idle, None
        if idle is not None:
            held = [x for *_, x in (y for y in self._tensors() if y[1] != "columns")]
            for tensor, before in zip(held, idle.states, strict=False):
                if tensor.shape[1:] == before.shape[1:]:  # not while tokens may be taken back
                    tensor[idle.index_b.to(tensor.device)] = before
        holding = {layer for layer, *_ in self._tensors()}
        if began is not None and len(holding) < len(self._layers):
            raise UnsupportedModelError(
                f"Layers {sorted(self._layers.keys() - holding)} of this model keep their state"
                " elsewhere than in transformers' cache, where this engine cannot follow it. Detach"
                " the engine.",
                "a state that is in no cache of transformers",
            )

    @property
    def torn(self) -> bool:
        """Whether a pass began and wrote to some, and did not end."""
        return self._before is not None and self._before != self._stamps()

    def _stamps(self) -> list[Any]:
        return [(id(x), -1 if x.is_inference() else x._version) for *_, x in self._tensors()]

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {f"{layer}.{table}.{i}": x for layer, table, i, x in self._tensors()}

    def restored(
        self,
        given: Mapping[str, Tensor],
        first: Layer,
        devices: Mapping[int, torch.device],
        path: str | Path,
    ) -> States:
        """What was saved. first: a layer with keys of the same cache.

        Raises CacheFileError for what no cache of this model can hold. devices: where layers are;
        -1: any other.
        """
        found, batch = self.kept(), len(first.sequences)
        found.clear()
        known = {
            f"{layer}.{table}.{i}": (layer, table, i)
            for layer, own in found._layers.items()
            for table in _TABLES
            for i in getattr(own, table, ())
        }
        for name, tensor in given.items():
            if name not in known or tensor.dim() < 2 or len(tensor) != batch:
                raise CacheFileError(
                    f"{path} has a right checksum, but what is in it cannot be: {name}, of shape"
                    f" {list(tensor.shape)}, is no state of {batch} sequences of this model."
                    " Nothing was loaded. Save the cache again."
                )
            index, table, i = known[name]
            layer, own = found._layers[index], tensor.to(devices.get(index, devices[-1]))
            if isinstance(layer, ChunkedLayer):
                layer.seen, layer.is_initialized = first.columns_seen, True
            else:
                layer.lazy_initialization(**{table: own}, state_idx=i)
                layer.has_previous_state[i] = True
            getattr(layer, table)[i] = own
        return found


def place_layers(
    found: Fingerprint, context: Context
) -> tuple[list[Any], list[EngineLayer], States]:
    """The layers of a cache in the order of the model, those with keys, and their states."""
    beside = {state.index: state for state in found.states}
    own: dict[int, EngineLayer] = {}
    for kind in found.kinds:
        state = beside.get(kind.index)
        if state is None:
            own[kind.index] = EngineLayer(kind, context)
        else:
            own[kind.index] = HybridLayer(kind, context, state.count)
    every = [own.get(i) or _alone(beside[i]) for i in sorted({*own, *beside})]
    holding = {i: every[i] for i, state in beside.items() if state.count or state.chunk}
    return every, list(own.values()), States(holding)


def _alone(state: StateKind) -> Any:
    """transformers' own layer without keys and values."""
    if state.chunk:
        return ChunkedLayer(state.chunk)
    if not state.count and hasattr(cache_utils, "DummyLayer"):
        return cache_utils.DummyLayer()  # type: ignore[no-untyped-call]
    return LinearAttentionLayer(max(1, state.count))


def _blank(layer: Any) -> Any:
    """A layer of the same sort that holds nothing."""
    if isinstance(layer, ChunkedLayer):
        return ChunkedLayer(layer.chunk)
    return LinearAttentionLayer(layer.number_of_states)


def _trim(layer: Any, tokens: int) -> None:
    """Lets convolutions forget the last tokens, and what they hold for taking back more."""
    if isinstance(layer, ChunkedLayer):
        return layer.trim(tokens)
    for i, state in layer.conv_states.items():
        if state is not None:
            end = state.shape[-1] - tokens
            # At the begin of a text fewer columns are there than a kernel has: zeros come before.
            columns = state[..., max(0, end - layer.conv_kernel_size[i]) : end]
            missing = layer.conv_kernel_size[i] - columns.shape[-1]
            layer.conv_states[i] = torch.nn.functional.pad(columns, (missing, 0)).contiguous()
    return None


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(x) for key, x in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


_PLAIN = tuple(set(vars(LinearAttentionLayer())) - {"record_past"})
