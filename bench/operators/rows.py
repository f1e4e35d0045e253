"""Paged rows with random contents for the cases of the decode operators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvpress.ops import Pages

SEED = 20
SPREAD = 16  # the longest ragged row may be this many times the shortest


@dataclass(frozen=True, kw_only=True)
class RowsShape:
    """Rows of equal or ragged length; ragged ones hold about as many slots in total.

    shuffled: pages in random order, as a pool comes to after rows grew and shrank for long. By
    default each row's pages follow one another, as the store lays them out after a prompt.
    """

    batch: int
    heads: int
    group: int
    width: int
    slots: int
    dtype: torch.dtype
    ragged: bool
    shuffled: bool = False
    page_slots: int = 16

    @property
    def name(self) -> str:
        """The shape in letters, the storage, and `ragged` and `shuffled` where it is."""
        letters = f"B{self.batch}-H{self.heads}-G{self.group}-D{self.width}-S{self.slots}"
        storage = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        marks = ("-ragged" if self.ragged else "") + ("-shuffled" if self.shuffled else "")
        return f"{letters}-{storage[self.dtype]}{marks}"

    @property
    def parameters(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "batch": self.batch,
            "kv_heads": self.heads,
            "group": self.group,
            "width": self.width,
            "slots": self.slots,
            "storage": str(self.dtype).removeprefix("torch."),
            "rows": "log-uniform" if self.ragged else "equal",
            "page_slots": self.page_slots,
            "pages": "shuffled" if self.shuffled else "consecutive",
        }

    @property
    def scaling(self) -> float:
        """1/√D."""
        return 1 / math.sqrt(self.width)

    @property
    def lengths(self) -> list[int]:
        """Slots of every row; ragged lengths are log-uniform over `SPREAD` times the shortest."""
        rows = self.batch * self.heads
        if not self.ragged:
            return [self.slots] * rows
        # Stratified, so that few rows spread as widely as many; shuffled over the sequences.
        generator = torch.Generator().manual_seed(SEED)
        place = torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)
        drawn = SPREAD ** (place / rows).double()
        return [math.ceil(x) for x in (drawn * self.slots * rows / drawn.sum()).tolist()]

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that all rows hold."""
        return sum(self.lengths) * 2 * self.width * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Operations of the two matrix-vector products of one query per query head."""
        return sum(self.lengths) * self.group * 2 * 2 * self.width


@dataclass(frozen=True)
class Rows:
    """The operands of one decode: a query per sequence, the pools, the table and the counts."""

    query_BN1D: Tensor
    key_PDS: Tensor
    value_PSE: Tensor
    table_RW: Tensor
    counts_R: Tensor

    @property
    def pages(self) -> Pages:
        """The pools, the table and the counts, as operators take them."""
        return Pages(self.key_PDS, self.value_PSE, self.table_RW, self.counts_R)

    def copy(self) -> Rows:
        """The same in fresh memory."""
        return Rows(*(tensor.clone() for tensor in (self.query_BN1D, *self.pages)))


def make_rows(shape: RowsShape, device: torch.device, room: int = 0) -> Rows:
    """Random rows with `room` free slots behind each."""
    generator = torch.Generator().manual_seed(SEED)
    counts_R = torch.tensor(shape.lengths)
    pages_R = ((counts_R + room + shape.page_slots - 1) // shape.page_slots).tolist()
    table_RW = torch.zeros(len(pages_R), max(pages_R), dtype=torch.int32)
    order = torch.arange(sum(pages_R))
    if shape.shuffled:
        order = torch.randperm(len(order), generator=generator)
    for r, pages in enumerate(torch.split(order.to(torch.int32), pages_R)):
        table_RW[r, : len(pages)] = pages
    on_device = torch.Generator(device).manual_seed(SEED)

    def random(*lengths: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*lengths, generator=on_device, dtype=dtype, device=device)

    pages, slots, width = sum(pages_R), shape.page_slots, shape.width
    return Rows(
        random(shape.batch, shape.heads * shape.group, 1, width),
        random(pages, width, slots, dtype=shape.dtype),
        random(pages, slots, width, dtype=shape.dtype),
        table_RW.to(device),
        counts_R.to(device),
    )


def exact_attention(rows: Rows, scaling: float) -> tuple[Tensor, Tensor]:
    """Output `[B, N, 1, E]` and LSE `[B, N, 1]` of the formula in float64, row by row."""
    page_slots, heads = rows.key_PDS.shape[2], rows.query_BN1D.shape[1]
    query_RGD = rows.query_BN1D.double().view(len(rows.counts_R), -1, rows.key_PDS.shape[1])
    outs, lses = [], []
    for r, count in enumerate(rows.counts_R.tolist()):
        pages = rows.table_RW[r, : -(-count // page_slots)].long()
        key_DS = rows.key_PDS[pages].transpose(0, 1).flatten(1)[:, :count].double()
        value_SE = rows.value_PSE[pages].flatten(0, 1)[:count].double()
        logits_GS = query_RGD[r] @ key_DS * scaling
        lses.append(logits_GS.logsumexp(-1))
        outs.append(logits_GS.softmax(-1) @ value_SE)
    shape = (rows.query_BN1D.shape[0], heads, 1)
    return torch.stack(outs).view(*shape, -1), torch.stack(lses).view(shape)
