"""The launches of every GPU kernel, recorded without a GPU.

The operators run on small CPU tensors with launching replaced by recording, so that what is found
is what would be launched: the same argument types, constants and launch parameters.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args
from unittest import mock

import torch
from kvpress.csrc import triton_common
from triton.runtime.jit import JITFunction

from kvpress import ops
from kvpress.formulas import page_cells
from kvpress.formulas.block_map import GROUPS, Blocks
from kvpress.formulas.merging import Merging
from kvpress.formulas.page_layout import PageLayout
from kvpress.ops import (
    Always,
    Bounds,
    Columns,
    Logits,
    Noise,
    Old,
    Pages,
    Places,
    Reduction,
    RowPages,
    Token,
    Turning,
)
from kvpress.types import NoiseKind

WIDTHS, DTYPES = (64, 128, 256), {"fp32": torch.float32, "bf16": torch.bfloat16}
_NAMES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched."""

    operator: str
    kernel: Any
    case: str
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


def launches(target: int) -> list[Launch]:
    """The kernels of every operator with the launch parameters of an architecture."""
    found: list[Launch] = []
    with mock.patch.object(triton_common, "architecture", lambda index: target):
        for width, (name, dtype) in itertools.product(WIDTHS, DTYPES.items()):
            for operator, case, args in operands(width, dtype):
                label = " ".join(filter(None, (f"{name} D={width}", case)))
                with recorded(label, found):
                    ops.implementation(operator, "triton_kernel")(*args)
    unique = {_key(launch): launch for launch in reversed(found)}
    return sorted(unique.values(), key=lambda launch: (launch.operator, launch.kernel.__name__))


@contextlib.contextmanager
def recorded(case: str, into: list[Launch]) -> Iterator[None]:
    """Kernels are not launched inside, but listed."""

    def record(kernel: Any, *args: Any, **options: Any) -> None:
        numbers = {name: options.pop(name, 3) for name in ("num_warps", "num_stages")}
        given = {n: v for n, v in options.items() if n in kernel.arg_names}
        given.update(zip(kernel.arg_names, args, strict=False))
        home = kernel.fn.__module__.split(".")[-2]  # operators share kernels
        into.append(Launch(home, kernel, case, given, **numbers))

    with mock.patch.object(JITFunction, "run", record):
        yield


def operands(width: int, dtype: torch.dtype) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """(operator, what is special, arguments) for sequences of 2, KV heads of 2 and groups of 4."""
    table, page = torch.zeros(4, 16, dtype=torch.int32), 16
    key, value = torch.zeros(1, width, page, dtype=dtype), torch.zeros(1, page, width, dtype=dtype)
    counts, batch = torch.full((4,), 16), torch.full((2,), 99)
    query, token = (
        torch.zeros(2, 8, 1, width, dtype=dtype),
        torch.zeros(2, 2, 1, width, dtype=dtype),
    )
    pages, logits = Pages(key, value, table, counts), Logits(0.1)
    yield "decode_rows", "", (query, pages, logits, True)
    many = query.expand(-1, -1, 32, -1)
    yield "decode_rows", "softcap Q=32", (many, pages, Logits(0.1, 50.0), True)
    yield "attend_parts", "", (query, pages, logits, False)
    yield "attend_parts", "weights", (query, pages, logits, True)
    yield from packed_operands(query, pages)
    columns = Columns(torch.zeros(1, page, dtype=torch.int32), torch.zeros(1, page))
    bounds = Bounds(batch, counts.clone(), counts.clone(), batch.clone(), "mass_per_age")
    for kind in get_args(NoiseKind):
        noise = Noise(kind, 1.0, 7, 3)
        held = (pages, columns, bounds)
        yield "decode_step", kind, (Token(query, token, token), *held, True, noise, logits)
    held = (pages, columns, bounds._replace(rank="mass"))
    merged = ("", 0, False), ("turned", width // 4, False), ("counted", 0, True)
    for case, pairs, counted in merged:
        turning = Turning(torch.zeros(pairs) if pairs else None)
        rule = Merging(own=2.7, memory=0.3, gain=0.7, counts=counted)
        yield "absorb_step", case, (*held, torch.zeros(2), turning, width - counted, rule)
    allowed = torch.ones(2, 2, 160, dtype=torch.bool)
    prompt = torch.zeros(2, 8, 160, width, dtype=dtype)
    yield from chosen_operands(query[:, :, 0])
    yield from sums_operands(prompt)
    yield from block_operands(prompt)
    yield "match_keys", "", (prompt[:, 2:4], prompt[:, :2], allowed)
    sums = torch.zeros(64, 2, 8, 1, dtype=torch.float32)
    yield "join_parts", "", (sums[..., None].repeat(1, 1, 1, 1, width), sums)
    for pool, last in ((key, True), (value, False)):
        dense = torch.zeros(16, width, dtype=dtype)
        kind = "channel-major" if last else "slot-major"
        yield "gather_slots", kind, (pool, torch.arange(16), last)
        yield "scatter_slots", f"{kind} scatter", (pool, torch.arange(16), dense, last)


def chosen_operands(query: torch.Tensor) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """The operators that choose among 512 pages of each row."""
    places = 512
    table, pages = torch.zeros(4, places, dtype=torch.int32), torch.full((4,), places)
    rows, named = RowPages(table, pages), Places(table, pages)
    ends, lengths = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.float32)
    bound = torch.zeros(*query.shape[:2], places, dtype=torch.float32)
    box = query[:1, :2].contiguous()
    yield "score_pages", "", (query, box, rows)
    for bits in page_cells.BITS:
        size = page_cells.cell_bytes(query.shape[2], 64, bits)
        cell = torch.zeros(1, size, dtype=torch.uint8)
        given = (query, box, cell, rows, named, bound)
        yield "score_cells", f"{bits} bits", (*given, bits, 64)
    yield "choose_pages", "", (bound, rows, Always(ends, pages, pages), pages)
    for case, logits in (("", Logits(0.1)), ("softcap", Logits(0.1, 50.0))):
        yield "missed_mass", case, (query, bound, rows, named, lengths, logits, 64)


def sums_operands(prompt: torch.Tensor) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Sums over the attention of prompts, and the largest of it."""
    tokens = prompt.shape[2]
    position = torch.arange(tokens).repeat(len(prompt), 2, 1)
    held = (prompt, prompt[:, :2], position, Logits(0.1))
    for kind in get_args(NoiseKind):
        yield "attention_sums", kind, (*held, Reduction(tokens), Noise(kind, 1.0, 7, 3))
    weights = torch.ones(len(prompt), tokens)
    for case, weight_BQ in (("largest", None), ("largest, weighted", weights)):
        reduction = Reduction(tokens, True, weight_BQ)
        yield "attention_sums", case, (*held, reduction, Noise("none", 1.0, 7, 3))


def block_operands(prompt: torch.Tensor) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """The operators of block-sparse prompts."""
    batch, heads, tokens, _ = prompt.shape
    blocks, codes = Blocks(tokens, tokens), prompt.to(torch.int8)
    numbers = torch.ones(batch, heads, tokens)
    scales = torch.ones(batch, 2, blocks.columns, GROUPS)
    yield (
        "estimate_blocks",
        "",
        (codes, numbers, codes[:, :2].clone(), scales, numbers, numbers, 32),
    )
    bits = torch.zeros(batch, heads, blocks.offsets[-1], dtype=torch.uint8)
    position = torch.arange(tokens).repeat(batch, 2, 1)
    sums = (Logits(0.1), Reduction(tokens), Noise("fresh", 1.0, 7, 3), bits)
    yield "attention_sums", "fresh, mapped", (prompt, prompt[:, :2], position, *sums)
    yield "attend_blocks", "", (prompt, prompt[:, :2], prompt[:, :2], bits, 0.1)
    yield "attend_blocks", "LSE", (prompt, prompt[:, :2], prompt[:, :2, :, :0], bits, 0.1)


def packed_operands(
    query: torch.Tensor, pages: Pages
) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """The operators on old slots: channels and 4 bits, and channels alone."""
    key, _, table, counts = pages
    width, none = query.shape[3], torch.empty(0)
    dense = torch.zeros(1, 64, width, dtype=key.dtype)
    held = torch.ones(2, 2, 64, dtype=torch.bool)
    prompt = torch.zeros(2, 8, 64, width, dtype=key.dtype)
    yield "channel_scores", "", (prompt, prompt[:, :2], held)
    for bits in (4, 16):
        kept = width * 5 // 8
        sizes = (64, width, width, kept, width, bits, bits, 64, 64, key.element_size())
        layout, case = PageLayout(*sizes), f"{bits} bits"
        channels = [torch.arange(n, dtype=torch.int16)[None] for n in (kept, width)]
        yield "pack", case, (dense, dense, *channels, list(layout))
        packed = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
        yield "unpack", case, (packed, *channels, list(layout), key)
        yield "page_bounds", case, (packed, *channels, list(layout), key, 2)
        own = [x.expand(4, -1).contiguous() for x in channels]
        holes = torch.zeros(1, 64, dtype=torch.int32)
        tensors = [packed, *own, table[:, :1].contiguous(), counts * 4, holes, none, none.long()]
        old = Old(tensors, list(layout))
        yield "decode_rows", case, (query, pages, Logits(0.1), True, old)
        yield "attend_parts", case, (query, pages, Logits(0.1), True, old)


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and attributes of a launch, as Triton derives them from arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(
        zip(launch.kernel.arg_names, launch.kernel.params, strict=True)
    ):
        given = launch.arguments[name]
        kind = "constexpr" if parameter.is_constexpr else _kind(given, parameter)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = given
            continue
        number = given.data_ptr() if isinstance(given, torch.Tensor) else given
        special = isinstance(number, int) and not parameter.do_not_specialize
        if special and number % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _kind(given: Any, parameter: Any) -> str:
    if isinstance(given, torch.Tensor):
        return "*" + _NAMES[given.dtype]
    if isinstance(given, float):
        return "fp32"
    if given == 1 and not parameter.do_not_specialize:
        return "constexpr"
    return "i32" if -(2**31) <= given < 2**31 else "i64"


def _key(launch: Launch) -> str:
    return repr((launch.kernel.__name__, specialise(launch), launch.num_warps, launch.num_stages))
