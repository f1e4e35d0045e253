"""What the Triton kernels share: noise, soft-capping, exact products, launch parameters."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpress.formulas import noise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Said at every launch, because the default differs between releases of Triton.
FUSED = {"enable_fp_fusion": True}
NOISES = {"none": 0, "frozen": 1, "fresh": 2}
ODD = tl.constexpr(noise._ODD)
FRESH = tl.constexpr(NOISES["fresh"])
LN2 = tl.constexpr(0.6931471805599453)
_NARROW = (torch.bfloat16, torch.float16)
_Launch = TypeVar("_Launch")


def by_architecture(
    table: Mapping[int, Mapping[tuple[int, int], _Launch]], tensor: Tensor, width: int, wide: bool
) -> _Launch:
    """The entry of a launch table for the tensor's device, head width and dot precision.

    The table maps the oldest architecture that an entry is for (80 for sm_80) to entries by
    (most channels, bytes of a factor).
    """
    own = architecture(tensor.device.index if tensor.is_cuda else -1)
    entries = table[max((known for known in table if known <= own), default=min(table))]
    size = 4 if wide else 2
    return entries[min(key for key in entries if key[0] >= width and key[1] == size)]


@functools.cache
def architecture(index: int) -> int:
    """The architecture of a CUDA device, 80 for sm_80; the oldest where there is none."""
    if index < 0:
        return 80
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels are launched on the tensor's device."""
    return torch.cuda.device_of(tensor)


def wide(*dtypes: torch.dtype) -> bool:
    """True unless tensor cores can multiply numbers of these dtypes exactly.

    The interpreter holds bfloat16 numbers as integers, which it cannot multiply.
    """
    first = dtypes[0]
    if INTERPRETED and first == torch.bfloat16:
        return True
    return first not in _NARROW or any(dtype != first for dtype in dtypes)


def noise_stream(seed: int, layer: int, first: int) -> int:
    """The part of the noise's coordinates that a launch has in common, as int32.

    first: number in the model of the query head that a kernel counts as 0.
    """
    seeded = noise._mix(noise._mix(seed) + (seed >> 32))
    return noise._signed(noise._mix(seeded + layer * noise._ODD) + first * noise._ODD)


@triton.jit
def address_of(table, s_S, count, PAGE: tl.constexpr):
    """Where slots of a row lie, page · PAGE + offset; in page 0 beyond its count."""
    page_S = tl.load(table + s_S // PAGE, mask=s_S < count, other=0).to(tl.int64)
    return page_S * PAGE + s_S % PAGE


@triton.jit
def mix(word):
    """The finaliser of kvpress/formulas/noise.py on uint32."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def noise_row(stream, head, query):
    """Where the numbers of one (query head, query position) start; `query` is -1 for frozen."""
    row = mix(head.to(tl.uint32) * ODD + stream.to(tl.uint32))
    return mix(row + query.to(tl.uint32) * ODD)


@triton.jit
def uniform(row, key):
    """Uniform fp32 numbers of keys at these positions, bit for bit those of formulas/noise.py."""
    word = mix(row + key.to(tl.uint32) * ODD)
    # Through int32: 23 bits fit, and the conversion from uint32 is slower.
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def exact_log(x):
    """ln x to a few ulp for normal x, also near 1, where the device's fast logarithm is not.

    With x = m·2^e and m in [√½, √2): ln x = e·ln 2 + 2·artanh((m − 1)/(m + 1)).
    """
    bits = x.to(tl.int32, bitcast=True)
    power = (bits - 0x3F3504F3) >> 23  # 0x3F3504F3 is √½
    m = (bits - power * 0x800000).to(tl.float32, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    tail = z * (0.33333333 + z * (0.2 + z * (0.14285714 + z * (0.11111111 + z * 0.09090909))))
    return power.to(tl.float32) * LN2 + 2.0 * (s + s * tail)


@triton.jit
def gumbel(row, key):
    """Standard Gumbel noise of keys at these positions: −ln E with E = −ln uniform."""
    # Only the inner argument comes near 1 with a result near 0 whose relative error counts.
    return -tl.log(-exact_log(uniform(row, key)))


@triton.jit
def tanh(x):
    """tanh x to a few ulp: a series near 0, where the exponentials would cancel."""
    z = x * x
    tail = z * (-0.33333333 + z * (0.13333333 + z * (-0.053968254 + z * 0.021869488)))
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(z < 0.04, x + x * tail, tl.where(x < 0, -far, far))


@triton.jit
def finish_logits(products, scaling, softcap, CAPPED: tl.constexpr):
    """Logits from products of queries and keys."""
    logits = products * scaling
    if CAPPED:
        logits = tanh(logits / softcap) * softcap
    return logits


@triton.jit
def finite(top):
    """The maximum to subtract: 0 where nothing was seen, because inf − inf is no number."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def grow(logits_MS, top_M, total_M):
    """One more block of a running softmax.

    Its exponentials relative to the largest logit so far, the factor for what was summed before,
    that logit, and the sum of all exponentials.
    """
    new_M = tl.maximum(top_M, tl.max(logits_MS, 1))
    weights_MS = tl.exp(logits_MS - finite(new_M)[:, None])
    shrink_M = tl.exp(top_M - finite(new_M))
    return weights_MS, shrink_M, new_M, total_M * shrink_M + tl.sum(weights_MS, 1)


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a·b with exact products and fp32 sums."""
    if WIDE:  # no early return: what follows one is compiled as well
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def weighted(weight, b, acc, WIDE: tl.constexpr):
    """acc + weight·b for fp32 weights.

    Half-precision values meet the weights as a sum of two half-precision numbers, so that the
    weights keep 16 bits or more on tensor cores.
    """
    if WIDE:
        return tl.dot(weight, b.to(tl.float32), acc, input_precision="ieee")
    high = weight.to(b.dtype)
    low = (weight - high.to(tl.float32)).to(b.dtype)
    return tl.dot(low, b, tl.dot(high, b, acc))
