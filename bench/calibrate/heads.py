"""What a repetition of a text attends to in every layer and head, and what predicts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from kvpress.bench.calibrate.watch import Given, watching
from torch import Tensor
from torch.nn import functional as F

import kvpress
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.formulas import ridge
from kvpress.formulas.rotation import Rotation
from kvpress.hf.rotation_probe import rotations
from kvpress.pipe.state.layer import Layer
from kvpress.store.base import KEY, MASS, POSITION, VALUE

LOOK = "kvzip:budget=1.0,sink=0,scope=row"  # keeps everything, and what the second look saw
PLAIN = "full"


def scores(model: Any, tokenizer: Any, ids_1T: Tensor) -> Tensor:
    """The largest attention that a repetition of the text gives to every token: fp32 `[L, H, T]`.

    Of the layers that have a budget. Raises PolicyError where these differ in KV heads.
    """
    rows = [columns[MASS][0].cpu() for _, columns in _layers(model, tokenizer, LOOK, ids_1T)]
    if len({len(mass_HT) for mass_HT in rows}) > 1:
        raise PolicyError(
            f"The layers of this model have {sorted({len(x) for x in rows})} KV heads; shares and"
            " regressions are found for models whose layers have equally many."
        )
    return torch.stack(rows)


def regressions(
    model: Any, tokenizer: Any, texts: Sequence[Tensor], score_LHT: Sequence[Tensor]
) -> Tensor:
    """The matrices that predict ln s of every layer: fp64 `[L, X, H]`, as `ridge.features` has X.

    texts: ids `[1, T]`. score_LHT: of each. Raises UnsupportedModelError where nobody knows how
    keys turn.
    """
    turns, total = rotations(model), list[ridge.Sums]()
    for ids_1T, known_LHT in zip(texts, score_LHT, strict=True):
        found = []
        for place, (layer, columns) in enumerate(_layers(model, tokenizer, PLAIN, ids_1T)):
            key_BHTD, rotation = columns[KEY][..., : layer.key_width], turns[layer.kind.index]
            feature_BTX = ridge.features(key_BHTD, columns[VALUE], columns[POSITION], rotation)
            found.append(ridge.sums(feature_BTX[0].cpu(), known_LHT[place]))
        total = [a.plus(b) for a, b in zip(total, found, strict=True)] if total else found
    return torch.stack([ridge.solve(x) for x in total])


def queries(model: Any, tokenizer: Any, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The queries of every layer with a budget, their rotation undone: what they are on average.

    Their mean, `[L, N, D]`, and the mean lengths of the pairs that turn, `[L, N, F]`, in fp32; of
    all tokens of all texts. Layers that do not turn have lengths of 0. Raises UnsupportedModelError
    where nobody knows how keys turn, where queries are no vectors of the keys that are stored
    (latents), and where layers differ in shape.
    """
    turns, found = rotations(model), list[tuple[Tensor, Tensor]]()
    for ids_1T in texts:
        sums = [_of_queries(*own, turns) for own in _asked(model, tokenizer, ids_1T)]
        found = [_plus(*pair) for pair in zip(found, sums, strict=True)] if found else sums
    if len({mean.shape for mean, _ in found}) != 1:
        raise UnsupportedModelError("the queries of its layers with a budget differ in shape")
    tokens = sum(ids_1T.shape[1] for ids_1T in texts)
    pairs = max(length.shape[1] for _, length in found)
    mean = torch.stack([mean for mean, _ in found]) / tokens
    padded = [F.pad(length, (0, pairs - length.shape[1])) for _, length in found]
    return mean.float(), (torch.stack(padded) / tokens).float()


def _asked(model: Any, tokenizer: Any, ids_1T: Tensor) -> list[tuple[Tensor, Layer]]:
    """The queries of a text in every layer that has a budget, `[1, N, T, D]`."""
    given = list[Tensor]()

    def see(own: Given, _out_BNQE: Tensor) -> None:
        given.append(own.query_BNQD)

    with kvpress.attach(model, PLAIN, tokenizer=tokenizer) as engine, torch.no_grad():
        cache = engine.new_cache()
        with watching(see):
            model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
        layers = list(cache.states)
    if len(given) != len(layers):
        raise UnsupportedModelError(f"{len(given)} of {len(layers)} layers show their queries")
    return [pair for pair in zip(given, layers, strict=True) if pair[1].kind.window is None]


def _of_queries(
    query_1NTD: Tensor, layer: Layer, turns: Sequence[Rotation | None]
) -> tuple[Tensor, Tensor]:
    """The sums over tokens of queries, and of the lengths of their pairs: fp64."""
    rotation = turns[layer.kind.index]
    if query_1NTD.shape[3] != layer.key_width:
        raise UnsupportedModelError("its queries are no vectors of the keys that are stored")
    if rotation is None:
        return query_1NTD[0].double().sum(1), query_1NTD.new_zeros(query_1NTD.shape[1], 0).double()
    position_T = torch.arange(query_1NTD.shape[2], device=query_1NTD.device)
    plain_1NTD = rotation.turn(query_1NTD, -position_T)
    return plain_1NTD[0].double().sum(1), rotation.lengths(plain_1NTD)[0].double().sum(1)


def _plus(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return a[0] + b[0], a[1] + b[1]


def _layers(
    model: Any, tokenizer: Any, policy: str, ids_1T: Tensor
) -> Iterator[tuple[Layer, dict[str, Tensor]]]:
    """The layers that have a budget, and what they hold of a text, by position."""
    with kvpress.attach(model, policy, tokenizer=tokenizer) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(input_ids=ids_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.states:
            if layer.kind.window is None:
                yield layer, layer.rows.dense_by_position([0])
