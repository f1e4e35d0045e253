"""The cases of `attention_sums` and `attend_sums`, beside PyTorch's causal attention.

`attention_sums` sums what a prompt's slots receive; `attend_sums` gives the attention output too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from kvpress.bench.common.timing import Call
from kvpress.bench.operators import probe
from kvpress.bench.operators.registry import Case, difference
from torch import Tensor

from kvpress import ops
from kvpress.formulas.noise import exponential
from kvpress.ops import Logits, Noise, Reduction
from kvpress.types import NoiseKind

CHECKED = 700  # tokens of a check, which holds the whole matrix in float64; no multiple of a tile
SEED, LAYER = 20, 2


@dataclass(frozen=True, kw_only=True)
class SumsShape:
    """A prompt of `tokens`; window None sums over all queries."""

    tokens: int
    heads: int
    group: int
    width: int
    noise: NoiseKind
    window: int | None

    @property
    def queries(self) -> int:
        """How many of the last queries are summed."""
        return self.tokens if self.window is None else min(self.window, self.tokens)

    @property
    def name(self) -> str:
        """The shape in letters, the noise and the window."""
        letters = f"P{self.tokens}-H{self.heads}-G{self.group}-D{self.width}"
        return f"{letters}-noise_{self.noise}-window_{self.window or 'all'}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "tokens": self.tokens,
            "kv_heads": self.heads,
            "group": self.group,
            "width": self.width,
            "noise": self.noise,
            "window": self.window or "all",
        }

    @property
    def scaling(self) -> float:
        """1/√D."""
        return 1 / math.sqrt(self.width)

    def product(self, queries: int) -> int:
        """Operations of the product of the last `queries` queries with the keys that they see."""
        first = self.tokens - queries + 1
        seen = (first + self.tokens) * queries // 2
        return 2 * self.width * self.heads * self.group * seen

    @property
    def bytes(self) -> int:
        """Bytes of the fp32 queries that are summed, of the keys and positions, and of the sums."""
        query = self.queries * self.heads * self.group * self.width * 4
        sums = self.tokens * self.heads * self.group * 4
        return query + sums + self.tokens * self.heads * (self.width * 4 + 8)


def attention_sums_case(shape: SumsShape) -> Case:
    """The sums of one prompt, beside causal attention over the same prompt."""
    flops = shape.product(shape.queries)
    return Case(
        group="attention_sums",
        name=shape.name,
        parameters=shape.parameters,
        bytes=shape.bytes,
        flops=flops,
        bound="flops",
        prepare=partial(_prepare, shape),
        check=partial(_check, shape),
        # Attention multiplies with the values too, for every query.
        other_work={
            "probe": 2 * probe.side(flops) ** 3,
            "sdpa": 2 * shape.product(shape.tokens),
            "attend_sums": 2 * flops,
        },
    )


def _operands(shape: SumsShape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(SEED)
    heads = shape.heads * shape.group
    query_BNQD, key_BHSD = (
        torch.randn(1, n, shape.tokens, shape.width, generator=generator, device=device)
        for n in (heads, shape.heads)
    )
    position_BHS = torch.arange(shape.tokens, device=device).repeat(1, shape.heads, 1)
    return query_BNQD, key_BHSD, position_BHS


def _settings(shape: SumsShape) -> tuple[Any, ...]:
    """What follows the tensors in a call of `attention_sums`."""
    return Logits(shape.scaling), Reduction(shape.queries), Noise(shape.noise, 1.0, SEED, LAYER)


def _prepare(shape: SumsShape, device: torch.device) -> dict[str, Call]:
    """One copy of the operands: the limit is arithmetic, and a model has just made them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    operands, settings = _operands(shape, device), _settings(shape)
    query, key, _ = operands
    value = torch.randn_like(key)
    module: Any = SimpleNamespace(num_key_value_groups=shape.group, is_causal=True)
    flops = shape.product(shape.queries)
    both: dict[str, Call] = {}
    if shape.window is None:
        both["attend_sums"] = lambda number: _attend(shape, ops.attend_sums, operands, value)
    return {
        "probe": probe.matmul(flops, query.dtype, device),
        "attention_sums": lambda number: ops.attention_sums(*operands, *settings),
        **both,
        "sdpa": lambda number: sdpa_attention_forward(
            module, query, key, value, None, scaling=shape.scaling
        )[0],
    }


def _attend(
    shape: SumsShape, operator: Any, operands: tuple[Tensor, Tensor, Tensor], value: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and sums by `attend_sums` or its reference."""
    query, key, position = operands
    noise = Noise(shape.noise, 1.0, SEED, LAYER)
    out, sums = operator(query, key, value, position, Logits(shape.scaling), noise)
    return out, sums


def _check(shape: SumsShape, device: torch.device) -> str | None:
    small = replace(shape, tokens=min(shape.tokens, CHECKED))
    operands, settings = _operands(small, device), _settings(small)
    given = ops.attention_sums(*operands, *settings)
    plain = ops.implementation("attention_sums", "reference")(*operands, *settings)
    exact = _exact(small, *operands)
    wrong = difference("sums", given, plain, exact)
    if wrong is not None or shape.window is not None:
        return wrong
    query, key, _ = operands
    value = key.flip(2)
    right, sums = _attend(small, ops.attend_sums, operands, value)
    expected, _ = _attend(small, ops.implementation("attend_sums", "reference"), operands, value)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.double(),
        key.double(),
        value.double(),
        is_causal=True,
        scale=small.scaling,
        enable_gqa=True,
    )
    out = difference("out of attend_sums", right, expected, dense)
    return out or difference("sums of attend_sums", sums, plain, exact)


def _exact(shape: SumsShape, query_BNQD: Tensor, key_BHSD: Tensor, position_BHS: Tensor) -> Tensor:
    """The formula in float64, with the whole matrix; the noise is exact by definition."""
    query_BHGQD = query_BNQD.double().reshape(
        len(query_BNQD), shape.heads, shape.group, shape.tokens, shape.width
    )
    logits_BHGQS = query_BHGQD @ key_BHSD.double()[:, :, None].mT * shape.scaling
    if shape.noise == "fresh":
        head_HG11 = torch.arange(shape.heads * shape.group, device=query_BNQD.device)
        position_BH1S = position_BHS[:, :, None]
        noise = exponential(
            SEED,
            LAYER,
            head_HG11.view(shape.heads, shape.group, 1, 1),
            position_BH1S[..., None],
            position_BH1S[..., None, :],
        )
        logits_BHGQS = logits_BHGQS - noise.double().log()
    token_P = torch.arange(shape.tokens, device=query_BNQD.device)
    logits_BHGQS = logits_BHGQS.masked_fill(token_P > token_P[:, None], -torch.inf)
    sums_BNS: Tensor = logits_BHGQS.softmax(-1)[..., -shape.queries :, :].sum(3).flatten(1, 2)
    return sums_BNS
