"""The cases of `decode_rows`, beside PyTorch's attention over a dense cache."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from kvpress.bench.common.timing import Call
from kvpress.bench.operators import probe
from kvpress.bench.operators.registry import Case, difference
from kvpress.bench.operators.rows import Rows, RowsShape, exact_attention, make_rows
from torch import Tensor

from kvpress import ops
from kvpress.ops import Logits

CHECKED = 16 << 20  # elements per pool in a check, which repeats the attention in float64


def decode_rows_case(shape: RowsShape, rotation: int, baseline: bool) -> Case:
    """One query per sequence against paged rows; `baseline` adds PyTorch's attention, dense."""
    return Case(
        group="decode_rows",
        name=shape.name,
        parameters=shape.parameters,
        bytes=shape.bytes,
        flops=shape.flops,
        bound="bytes",
        prepare=partial(_prepare, shape, rotation, baseline),
        check=partial(_check, shape),
    )


def copies_of(rows: Rows, shape: RowsShape, rotation: int) -> list[Rows]:
    """The rows and as many copies as outgrow the caches."""
    more = probe.copies(shape.bytes, rotation) - 1
    return [rows, *(rows.copy() for _ in range(more))]


def attend(copies: list[Rows], scaling: float, number: int) -> Tensor:
    """The output of `decode_rows` for the copy whose turn it is."""
    rows = copies[number % len(copies)]
    return ops.decode_rows(rows.query_BN1D, rows.pages, Logits(scaling), False)[0]


def _prepare(
    shape: RowsShape, rotation: int, baseline: bool, device: torch.device
) -> dict[str, Call]:
    copies = copies_of(make_rows(shape, device), shape, rotation)
    calls: dict[str, Call] = {
        "probe": probe.memory(shape.bytes, device, rotation),
        "decode_rows": partial(attend, copies, shape.scaling),
    }
    return {**calls, **_baselines(shape, rotation, device)} if baseline else calls


def _baselines(shape: RowsShape, rotation: int, device: torch.device) -> dict[str, Call]:
    """PyTorch's attention as transformers calls it for one new token.

    `sdpa` is the call for a batch without padding, where transformers asks for grouped queries;
    `sdpa_packed` has the query heads of a group in the place of queries, as where a mask is given.
    """
    from transformers.integrations.sdpa_attention import pack_gqa, sdpa_attention_forward

    module: Any = SimpleNamespace(num_key_value_groups=shape.group, is_causal=True)
    heads, count = shape.heads * shape.group, probe.copies(shape.bytes, rotation)
    lengths = (2, shape.batch, shape.heads, shape.slots, shape.width)
    first = torch.randn(lengths, device=device, dtype=shape.dtype)
    copies = [first, *(first.clone() for _ in range(count - 1))]
    query = torch.randn(shape.batch, heads, 1, shape.width, device=device, dtype=shape.dtype)

    def called(number: int) -> Any:
        key, value = copies[number % count]
        return sdpa_attention_forward(module, query, key, value, None, scaling=shape.scaling)[0]

    def packed(number: int) -> Tensor:
        # Half a turn away from the other call, which must not find this one's data in the caches.
        key, value = copies[(number + count // 2) % count]
        folded: Any = pack_gqa(query, shape.group)
        return torch.nn.functional.scaled_dot_product_attention(
            folded, key, value, scale=shape.scaling
        )

    return {"sdpa": called, "sdpa_packed": packed}


def smaller(shape: RowsShape) -> RowsShape:
    """The shape of a check: the same, with shorter rows where they are very long."""
    most = CHECKED // (shape.batch * shape.heads * shape.width)
    return replace(shape, slots=min(shape.slots, most))


def _check(shape: RowsShape, device: torch.device) -> str | None:
    small = smaller(shape)
    rows = make_rows(small, device)
    exact = exact_attention(rows, small.scaling)
    operands = (rows.query_BN1D, rows.pages, Logits(small.scaling), False)
    given = ops.decode_rows(*operands)
    plain = ops.implementation("decode_rows", "reference")(*operands)
    for name, one, other, right in zip(("out", "lse"), given, plain, exact, strict=False):
        wrong = difference(name, one, other, right)
        if wrong is not None:
            return wrong
    return None
