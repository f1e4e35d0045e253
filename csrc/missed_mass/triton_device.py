"""Device code of `missed_mass`."""

from __future__ import annotations

import triton
import triton.language as tl
from kvpress.csrc.triton_common import finish_logits, finite


@triton.jit
def mark(missed, place, held, chosen, BLOCK_W: tl.constexpr):
    """Writes for every place of a row whether its page is missed, and waits for it."""
    for start in range(0, held, BLOCK_W):
        w_W = start + tl.arange(0, BLOCK_W)
        tl.store(missed + w_W, tl.full([BLOCK_W], 1, tl.int8), mask=w_W < held)
    tl.debug_barrier()
    for start in range(0, chosen, BLOCK_W):
        i_W = start + tl.arange(0, BLOCK_W)
        place_W = tl.load(place + i_W, mask=i_W < chosen, other=0)
        inside_W = (i_W < chosen) & (place_W < held)
        tl.store(missed + place_W, tl.zeros([BLOCK_W], tl.int8), mask=inside_W)
    tl.debug_barrier()


@triton.jit
def longest_of(length, table, missed, held, BLOCK_W: tl.constexpr):
    """The longest value of the missed pages of a row."""
    longest_W = tl.zeros([BLOCK_W], tl.float32)
    none_W = tl.zeros([BLOCK_W], tl.int32)
    for start in range(0, held, BLOCK_W):
        w_W = start + tl.arange(0, BLOCK_W)
        missed_W = tl.load(missed + w_W, mask=w_W < held, other=0) != 0
        page_W = tl.load(table + w_W, mask=missed_W, other=0).to(tl.int64)
        value_W = tl.load(length + page_W * 2 + 1, mask=missed_W, other=0)
        none_W = tl.maximum(none_W, (value_W != value_W).to(tl.int32))
        longest_W = tl.where(value_W > longest_W, value_W, longest_W)
    return tl.where(tl.max(none_W, 0) > 0, float("nan"), tl.max(longest_W, 0))


@triton.jit
def logits_of(
    bound, length, table, missed, w_W, held, error, scaling, softcap,
    CAPPED: tl.constexpr, ROUNDED: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Bounds of the logits of missed pages, −inf for others."""
    missed_W = tl.load(missed + w_W, mask=w_W < held, other=0) != 0
    page_W = tl.load(table + w_W, mask=missed_W, other=0).to(tl.int64)
    length_W = tl.load(length + page_W * 2, mask=missed_W, other=0)
    bound_W = tl.load(bound + w_W, mask=missed_W, other=0)
    logit_W = finish_logits(bound_W + error * length_W, scaling, softcap, CAPPED)
    logit_W += tl.abs(logit_W) * ROUNDED
    logit_W = tl.where(logit_W <= MOST, logit_W, MOST)
    return tl.where(missed_W, logit_W, float("-inf"))


@triton.jit(do_not_specialize=["table_width", "error", "extra", "scaling", "softcap"])
def missed_kernel(
    query, bound, table, pages, place, chosen, length, missed, mass, longest,
    table_width, error, extra, scaling, softcap, GROUP: tl.constexpr, D: tl.constexpr,
    CAPPED: tl.constexpr, ROUNDED: tl.constexpr, MOST: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One row: which of its pages are missed, and what each of its query heads misses."""
    row, d_D = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    held, read = tl.load(pages + row).to(tl.int32), tl.load(chosen + row).to(tl.int32)
    table += row * table_width
    missed += row * table_width
    mark(missed, place + row * table_width, held, read, BLOCK_W)
    tl.store(longest + row, longest_of(length, table, missed, held, BLOCK_W))
    for g in range(GROUP):
        head = row * GROUP + g
        query_D = tl.load(query + head * D + d_D, mask=d_D < D, other=0).to(tl.float32)
        own = error * tl.sqrt(tl.sum(query_D * query_D, 0))
        top_W = tl.full([BLOCK_W], float("-inf"), tl.float32)
        total_W = tl.zeros([BLOCK_W], tl.float32)
        for start in range(0, held, BLOCK_W):
            logit_W = logits_of(
                bound + head * table_width, length, table, missed, start + tl.arange(0, BLOCK_W),
                held, own, scaling, softcap, CAPPED, ROUNDED, MOST,
            )  # fmt: skip
            new_W = tl.maximum(top_W, logit_W)
            total_W *= tl.exp(top_W - finite(new_W))
            total_W += tl.exp(logit_W - finite(new_W))
            top_W = new_W
        top = tl.max(top_W, 0)
        total = tl.sum(total_W * tl.exp(top_W - finite(top)), 0)
        found = top + (tl.log(tl.where(total == 0, 1.0, total)) + extra)
        tl.store(mass + head, tl.where(top == float("-inf"), top, found))
