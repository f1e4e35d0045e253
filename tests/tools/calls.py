"""Calls of every operator with tiny operands, by a seed, and mutations of them.

A call is a dictionary of all operands by name, those of groups included. Most are valid as they are
made; now and then a length is 0.
"""

from __future__ import annotations

import functools
import math
import os
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import packing
import torch
import xxhash
from torch import Tensor

from kvpress.formulas.block_map import Blocks
from kvpress.formulas.page_cells import cell_bytes
from kvpress.formulas.page_tree import tree_of
from kvpress.ops.operands import flattening, grouped, leaves
from kvpress.ops.registry import operands_of

Call = dict[str, Any]


def flat(name: str, *groups: Any) -> tuple[Any, ...]:
    """The operands of a call as PyTorch takes them."""
    form: Any = operands_of(name)
    return flattening(form)(*groups)


def operands(name: str, call: Call) -> tuple[Any, ...]:
    """The operands of a call in their groups."""
    form: Any = operands_of(name)
    return grouped(form, [call[leaf] for leaf in leaves(form)])


FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
DTYPES += (torch.bool, torch.complex64)
LARGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
INTEGERS = (-(2**63), -(2**31), -65, -1, 0, 1, 2, 5, 16, 31, 32, 63, 64, 65, *LARGE)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, -0.5, 0.0, 1e-300, 0.5, 2.0, 1e7, 1e300)


class Maker:
    """Random sizes and tensors of one call."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.dtype = self.random.choice(FLOATS)

    def size(self, *sizes: int) -> int:
        """One of these, now and then 0."""
        return 0 if self.random.random() < 0.02 else self.random.choice(sizes)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape).to(dtype or self.dtype)

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def pages(self, rows: int, spare: int, widths: tuple[int, ...] = (1, 7, 8, 16)) -> Call:
        """Pools and a table; rows have room for `spare` more slots than they hold."""
        page, table = self.size(1, 3, 5, 16, 24), self.size(1, 2, 3)
        width, value_width = self.size(*widths), self.size(1, 6, 16)
        room = max(0, page * table - spare)
        counts = torch.tensor([self.random.randint(0, room) for _ in range(rows)]).long()
        pages = self.size(rows * table + 1) if room + spare else 0
        order = torch.randperm(max(pages, rows * table))[: rows * table]
        key_PDS = self.floats(pages, width, page)
        value_PSE = self.floats(pages, page, value_width)
        table_RW = order.view(rows, table).int()
        return {
            "key_PDS": key_PDS,
            "value_PSE": value_PSE,
            "table_RW": table_RW,
            "counts_R": counts,
        }

    def old(self, rows: int, pools: Call, every: bool) -> Call:
        """A part of old slots, or none."""
        sizes = (pools["key_PDS"].shape[1], pools["value_PSE"].shape[2])
        if self.random.random() < 0.6 or not rows or min(sizes) < 1:
            return {"tensors": [], "layouts": []}
        bits = [self.random.choice((16, 8, 4, 2)) for _ in range(2)]
        kept = (self.random.randint(1, sizes[0]), self.random.randint(1, sizes[1]))
        layout = packing.layout_of(*bits, sizes, kept, self.dtype, 64, (32, 32))
        pages_of_rows = [self.random.randint(0, 1) for _ in range(rows)]
        holes = every or self.flag()
        part = packing.make_part(layout, pages_of_rows, self.dtype, holes)
        if every:
            position_PS = part.tensors[5]
            part.tensors[6] = torch.rand(position_PS.shape)
            part.tensors[7] = torch.zeros(rows, dtype=torch.int64)
        return {"tensors": part.tensors, "layouts": list(layout)}

    def heads(self) -> tuple[int, int, int]:
        """B, H and N."""
        heads = self.size(1, 2)
        return self.size(1, 2), heads, heads * self.size(1, 3)

    def books(self, batch: int, rows: int) -> Call:
        seen = [self.random.randint(200, 300) for _ in range(batch)]
        quota = [self.random.randint(0, 30) for _ in range(rows)]
        recent = [self.random.randint(0, 40) for _ in range(rows)]
        sink = [self.random.choice((0, 4, 90)) for _ in range(batch)]
        names = ("seen_B", "quota_R", "recent_R", "sink_B")
        lists = (seen, quota, recent, sink)
        return {name: torch.tensor(x).long() for name, x in zip(names, lists, strict=True)}

    def columns(self, pools: Call, mass: bool) -> Call:
        """Positions that differ, and a mass, which is no number where there is no slot."""
        pages, _, page = pools["key_PDS"].shape
        position_PS = torch.randperm(max(200, pages * page))[: pages * page].view(pages, page).int()
        mass_PS = torch.full((pages, page), math.nan)
        for row, count in enumerate(pools["counts_R"].tolist() if pages else []):
            slot_S = torch.arange(count)
            page_S = pools["table_RW"][row].long()[slot_S // max(1, page)]
            mass_PS[page_S, slot_S % max(1, page)] = torch.rand(count) * 3
        return {"position_PS": position_PS, "mass_PS": mass_PS if mass else None}

    def noise(self) -> Call:
        kind = self.random.choice(("none", "frozen", "fresh"))
        tau = self.random.choice((1.0, 1.0, 0.7))
        seed, first = self.random.getrandbits(40), self.random.choice((0, 0, 5))
        return {"noise": kind, "tau": tau, "seed": seed, "layer": 3, "first": first}

    def logits(self) -> Call:
        return {"scaling": 0.4, "softcap": self.random.choice((0.0, 0.0, 5.0))}

    def prompt(self) -> tuple[Call, Blocks]:
        """Queries and keys of the last tokens of a prompt."""
        (batch, heads, query_heads), slots = self.heads(), self.size(1, 5, 40, 70, 130)
        queries = min(slots, self.size(1, 3, 66, 130))
        query = self.floats(batch, queries, query_heads, 8).transpose(1, 2)
        key = self.floats(batch, heads, slots, 8, dtype=self.random.choice(FLOATS))
        return {"query_BNQD": query, "key_BHSD": key}, Blocks(queries, slots)


def decode_rows(make: Maker) -> Call:
    batch, heads, query_heads = make.heads()
    pools = make.pages(batch * heads, 0)
    query = make.floats(batch, query_heads, make.size(1, 2, 7), pools["key_PDS"].shape[1])
    old = make.old(batch * heads, pools, False)
    return {"query_BNQD": query, **pools, **make.logits(), "need_weights": make.flag(), **old}


def attend_parts(make: Maker) -> Call:
    return decode_rows(make)


def decode_step(make: Maker) -> Call:
    batch, heads, query_heads = make.heads()
    pools = make.pages(batch * heads, 1)
    widths = pools["key_PDS"].shape[1], pools["value_PSE"].shape[2]
    call = {
        "query_BN1D": make.floats(batch, query_heads, 1, widths[0], dtype=torch.float32),
        "key_BH1D": make.floats(batch, heads, 1, widths[0]),
        "value_BH1E": make.floats(batch, heads, 1, widths[1]),
        **pools,
        **make.columns(pools, make.flag()),
        **make.books(batch, batch * heads),
        "evict": make.flag(),
    }
    ranks = ("mass", "mass_per_age", "position") if call["mass_PS"] is not None else ("position",)
    old = make.old(batch * heads, pools, True)
    return {**call, "rank": make.random.choice(ranks), **make.noise(), **make.logits(), **old}


def decode_steps(make: Maker) -> Call:
    heads, mass, steps = make.size(1, 2), make.flag(), []
    query_heads, width, value_width = heads * make.size(1, 3), make.size(7, 8), make.size(1, 6)
    for _ in range(make.size(1, 2, 3)):
        pools = make.pages(heads, 1, (width,))
        pools["value_PSE"] = make.floats(*pools["value_PSE"].shape[:2], value_width)
        token = {
            "queries": make.floats(1, query_heads, 1, width, dtype=torch.float32),
            "keys": make.floats(1, heads, 1, width),
            "values": make.floats(1, heads, 1, value_width),
        }
        columns = make.columns(pools, mass)
        noise, evict = make.noise(), {"evict": int(make.flag())}
        steps.append({**token, **pools, **columns, **make.books(1, heads), **evict, **noise})
    names = {"key_PDS": "key_pools", "value_PSE": "value_pools", "table_RW": "tables"}
    names |= {"counts_R": "counts", "position_PS": "positions", "mass_PS": "masses"}
    names |= {"seen_B": "seen", "quota_R": "quotas", "recent_R": "recents", "sink_B": "sinks"}
    alike = {"noise": make.noise()["noise"], "layer": 3, "first": 0}
    lists = {
        names.get(name, name): [step[name] for step in steps]
        for name in (steps[0] if steps else {})
        if name not in alike
    }
    if not steps:
        lists = {name: [] for name in leaves(operands_of("decode_steps"))}
    if not mass:
        lists["masses"] = []
    rank = make.random.choice(("mass", "mass_per_age", "position") if mass else ("position",))
    return {**lists, **alike, "rank": rank, **make.logits()}


def absorb_step(make: Maker) -> Call:
    batch, heads, _ = make.heads()
    make.dtype = torch.float32
    pools = make.pages(batch * heads, 0, (7, 8, 16))  # along one channel all keys are alike
    width = pools["key_PDS"].shape[1]
    counts, keys = make.flag() and width > 1, make.flag()
    ranks = ("mass", "mass_per_age", "position")
    turned = keys and make.flag()
    return {
        **pools,
        **make.columns(pools, True),
        **make.books(batch, batch * heads),
        "rank": make.random.choice(ranks),
        "threshold_B": torch.tensor([make.random.choice((math.nan, -1.0)) for _ in range(batch)]),
        "frequency_F": torch.rand((width - counts) // 2) if turned else None,
        "interleaved": make.flag(),
        "start": 0,
        "width": width - counts,
        "own": 1.5,
        "memory": 0.5,
        "gain": 0.3,
        "largest": make.flag(),
        "normalised": make.flag(),
        "together": make.flag(),
        "fixed": make.random.choice((None, 0.5)),
        "keys": ("unrotated" if turned else "rotated") if keys else "values_only",
        "sinks": make.flag(),
        "counts": counts,
    }


def attention_sums(make: Maker) -> Call:
    call, blocks = make.prompt()
    positions = torch.arange(blocks.slots).repeat(*call["key_BHSD"].shape[:2], 1)
    window = make.random.choice((0, 1, 200))
    numbers = make.logits()
    map_BNX = _map(make, call, blocks) if make.flag() and not numbers["softcap"] else None
    largest, weighted, noise = make.flag(), make.flag(), make.noise()
    if largest:
        noise |= {"noise": "none", "tau": 1.0}
    weight_BQ = torch.rand(len(positions), blocks.queries) if weighted else None
    reduction = {"window": window, "largest": largest, "weight_BQ": weight_BQ}
    return {
        **call,
        "position_BHS": positions,
        **numbers,
        **reduction,
        **noise,
        "map_BNX": map_BNX,
    }


def attend_sums(make: Maker) -> Call:
    call, blocks = make.prompt()
    call["query_BNQD"] = make.floats(*call["query_BNQD"].shape[:2], blocks.slots, 8)
    call["key_BHSD"] = call["key_BHSD"].to(make.dtype)
    value = make.floats(*call["key_BHSD"].shape[:3], make.size(1, 6, 16))
    positions = torch.arange(blocks.slots).repeat(*call["key_BHSD"].shape[:2], 1)
    numbers = make.logits()
    whole = Blocks(blocks.slots, blocks.slots)
    map_BNX = _map(make, call, whole) if make.flag() and not numbers["softcap"] else None
    call |= {"value_BHSE": value, "position_BHS": positions, **numbers, **make.noise()}
    return {**call, "map_BNX": map_BNX}


def _map(make: Maker, call: Call, blocks: Blocks) -> Tensor:
    """Some blocks, of which every query sees one."""
    map_BNX = torch.randint(0, 256, (*call["query_BNQD"].shape[:2], blocks.offsets[-1]))
    for offset in blocks.offsets[:-1]:
        map_BNX[..., offset] |= 1
    return map_BNX.to(torch.uint8)


def attend_blocks(make: Maker) -> Call:
    call, blocks = make.prompt()
    value = make.floats(*call["key_BHSD"].shape[:3], make.size(1, 6, 16))
    return {**call, "value_BHSE": value, "map_BNX": _map(make, call, blocks), "scaling": 0.4}


def estimate_blocks(make: Maker) -> Call:
    call, blocks = make.prompt()
    query, key = (torch.randint(-7, 8, x.shape).to(torch.int8) for x in call.values())
    batch, heads, queries, _ = query.shape
    return {
        "query_BNQD": query,
        "query_scale_BNQ": torch.rand(batch, heads, queries) + 0.1,
        "key_BHSD": key,
        "key_scale_BHJ4": torch.rand(batch, key.shape[1], blocks.columns, 4) + 0.1,
        "shift_BNS": torch.randn(batch, heads, blocks.slots),
        "threshold_BNQ": torch.randn(batch, heads, queries) * 20 + 60,
        "local": make.random.choice((0, 1, 31, 32, 33, 128)),
    }


def match_keys(make: Maker) -> Call:
    batch, heads, _ = make.heads()
    evicted, kept = make.size(1, 4, 17), make.size(1, 9, 40)
    return {
        "evicted_BHVD": make.floats(batch, evicted, heads, 8).transpose(1, 2),
        "kept_BHKD": make.floats(batch, heads, kept, 8),
        "allowed_BHK": torch.rand(batch, heads, kept) < 0.7,
    }


def pack(make: Maker) -> Call:
    pages, widths = make.size(1, 3), (make.random.choice((5, 16)), make.random.choice((6, 16)))
    kept = (make.random.randint(1, widths[0]), make.random.randint(1, widths[1]))
    bits = [make.random.choice((16, 8, 4, 2)) for _ in range(2)]
    return {
        "key_PSD": make.floats(pages, 64, widths[0]),
        "value_PSE": make.floats(pages, 64, widths[1]),
        "channel_PC": _subsets(pages, kept[0], widths[0]),
        "channel_PU": _subsets(pages, kept[1], widths[1]),
        "layout": list(packing.layout_of(*bits, widths, kept, make.dtype, 64, (32, 32))),
    }


def _subsets(pages: int, kept: int, width: int) -> Tensor:
    if not pages:
        return torch.zeros(0, kept, dtype=torch.int16)
    return packing.subsets(pages, kept, width)


def unpack(make: Maker) -> Call:
    call = pack(make)
    like = call["key_PSD"].new_empty(0)
    page_PX = packing.implementation("pack", "reference")(*call.values())
    rest = {name: call[name] for name in ("channel_PC", "channel_PU", "layout")}
    return {"page_PX": page_PX, **rest, "like": like}


def page_bounds(make: Maker) -> Call:
    call = unpack(make)
    return {**call, "bits": make.random.choice((0, 2, 4) if call["layout"][0] % 32 == 0 else (0,))}


def _row_pages(make: Maker) -> tuple[Call, int, int, int]:
    """A table of pages, how many there are of rows; pages, sequences and query heads."""
    batch, heads, query_heads = make.heads()
    rows, places, pages = batch * heads, make.size(1, 3, 9, 40), make.size(1, 5, 30)
    held = [make.random.randint(0, places if pages else 0) for _ in range(rows)]
    table_RW = torch.randint(0, max(1, pages), (rows, places)).int()
    call = {"table_RW": table_RW, "pages_R": torch.tensor(held).long()}
    return call, pages, batch, query_heads


def _places(chosen: Sequence[int], held: Sequence[int], places: int) -> Tensor:
    """So many of the places that rows hold, as `choose_pages` returns them."""
    place_RW = torch.full((len(held), places), -1, dtype=torch.int32)
    for r, count in enumerate(chosen):
        place_RW[r, :count] = torch.randperm(held[r])[:count].sort().values.int()
    return place_RW


def score_pages(make: Maker) -> Call:
    call, pages, batch, heads = _row_pages(make)
    width = make.size(1, 7, 16, 40)
    ends = make.floats(pages, 2, width, dtype=make.random.choice(FLOATS))
    box_P2D = ends.sort(1).values
    return {"query_BND": make.floats(batch, heads, width), "box_P2D": box_P2D, **call}


def score_cells(make: Maker) -> Call:
    call = score_pages(make)
    (batch, heads, width), places = call["query_BND"].shape, call["table_RW"].shape[1]
    named = [make.random.randint(0, held) for held in call["pages_R"].tolist()]
    bits, slots = make.random.choice((2, 4)), make.random.choice((32, 64, 96))
    cells = (len(call["box_P2D"]), cell_bytes(width, slots, bits))
    return {
        "query_BND": call["query_BND"],
        "box_P2D": call["box_P2D"],
        "cell_PY": torch.randint(0, 256, cells, dtype=torch.uint8),
        "table_RW": call["table_RW"],
        "pages_R": call["pages_R"],
        "place_RW": _places(named, call["pages_R"].tolist(), places),
        "chosen_R": torch.tensor(named).long(),
        "bound_BNW": make.floats(batch, heads, places, dtype=torch.float32) * 99,
        "bits": bits,
        "slots": slots,
    }


def choose_pages(make: Maker) -> Call:
    call, pages, batch, heads = _row_pages(make)
    rows = len(call["pages_R"])
    bound_BNW = make.floats(batch, heads, call["table_RW"].shape[1], dtype=torch.float32) * 9
    span_P2 = torch.randint(0, 200, (pages, 2)).sort(1).values.int()
    sizes = {"sink_R": (0, 4, 90), "from_R": (200, 150, 20), "keep_R": (0, 1, 3, 20)}
    numbers = {
        name: torch.tensor([make.random.choice(some) for _ in range(rows)]).long()
        for name, some in sizes.items()
    }
    rounded = bound_BNW.round() if make.flag() else bound_BNW  # many are equal
    return {"bound_BNW": rounded, **call, "span_P2": span_P2, **numbers}


def missed_mass(make: Maker) -> Call:
    call, pages, batch, heads = _row_pages(make)
    places, held = call["table_RW"].shape[1], call["pages_R"].tolist()
    chosen = [make.random.randint(0, count) for count in held]
    bound_BNW = make.floats(batch, heads, places, dtype=torch.float32)
    return {
        "query_BND": make.floats(batch, heads, make.size(1, 7, 16, 40)),
        "bound_BNW": bound_BNW * make.random.choice((1, 30)),
        **call,
        "place_RW": _places(chosen, held, places),
        "chosen_R": torch.tensor(chosen).long(),
        "length_P2": torch.rand(pages, 2) * 5,
        **make.logits(),
        "slots": make.random.choice((1, 16, 64)),
    }


def decode_chosen(make: Maker) -> Call:
    batch, heads, query_heads = make.heads()
    rows, pools = batch * heads, make.pages(batch * heads, 0)
    width, old = pools["key_PDS"].shape[1], make.old(rows, pools, False)
    judged = list[Tensor]()
    if old["tensors"]:
        pages = len(old["tensors"][0])
        ends = make.floats(pages, 2, width, dtype=make.random.choice(FLOATS))
        judged = [ends.sort(1).values, torch.rand(pages, 2) * 5]
        judged.append(torch.zeros(pages, 1, dtype=torch.uint8))  # no cells: bytes decide too much
        judged.append(torch.randint(0, 200, (pages, 2)).sort(1).values.int())
    seen = [make.random.randint(200, 300) for _ in range(batch)]
    return {
        "query_BN1D": make.floats(batch, query_heads, 1, width),
        **pools,
        **make.logits(),
        **old,
        "judged": judged,
        "seen_B": torch.tensor(seen).long(),
        "slots": [make.random.choice((0, 40, 200)) for _ in range(rows)],
        "sink": make.random.choice((0, 4, 90)),
        "recent": make.random.choice((0, 50, 150)),
        "bits": 0,
        "candidates": make.random.choice((0, 2)),
    }


def channel_scores(make: Maker) -> Call:
    (batch, heads, query_heads), slots = make.heads(), make.size(1, 9, 33)
    return {
        "query_BNQD": make.floats(batch, query_heads, make.size(1, 3), 8),
        "key_BHSD": make.floats(batch, slots, heads, 8).transpose(1, 2),
        "held_BHS": torch.rand(batch, heads, slots) < 0.7,
    }


def gather_slots(make: Maker) -> Call:
    pages, page, width, last = make.size(1, 4), make.size(1, 5), make.size(1, 7), make.flag()
    address = torch.randperm(pages * page)[: make.size(1, 3, 20)]
    pool = torch.randint(0, 90, (pages, width, page) if last else (pages, page, width))
    return {"pool_PX": pool.to(make.random.choice(DTYPES)), "address_A": address, "slot_last": last}


def scatter_slots(make: Maker) -> Call:
    call = gather_slots(make)
    width = call["pool_PX"].shape[1 if call["slot_last"] else 2]
    slots = torch.randint(0, 90, (len(call["address_A"]), width)).to(call["pool_PX"].dtype)
    last = call.pop("slot_last")
    return {**call, "slots_AX": slots, "slot_last": last}


def join_parts(make: Maker) -> Call:
    parts, (batch, _, heads), queries = make.size(1, 3, 20), make.heads(), make.size(1, 5)
    lse = make.floats(parts, batch, heads, queries, dtype=torch.float32) * 9
    out = make.floats(*lse.shape, make.size(1, 6, 16, 21), dtype=torch.float32)
    nothing = torch.rand(lse.shape) < 0.2
    out[nothing], lse[nothing] = math.nan, -math.inf
    return {"out_JBNQE": out, "lse_JBNQ": lse}


def search_pages(make: Maker) -> Call:
    """Small whole numbers, whose scores are exact, so that all backends take the same way."""
    (batch, heads, query_heads), places = make.heads(), make.size(1, 2, 5, 9, 70)
    rows, width = batch * heads, make.size(1, 5, 16)
    pages_R = torch.tensor([make.random.randint(0, places) for _ in range(rows)]).long()
    table_RW = torch.randperm(rows * places + 1)[: rows * places].view(rows, places).int()
    box_P2D = make.floats(rows * places + 1, 2, width).sort(1).values.round()
    tree_RX2D = tree_of(box_P2D, table_RW, pages_R)
    query_BND = make.floats(batch, query_heads, width, dtype=make.random.choice(FLOATS))
    first_P1 = torch.randint(0, 20, (len(box_P2D), 1)).int()
    limits = [torch.randint(0, 20, (rows,)) for _ in range(3)]
    return {
        "query_BND": query_BND.round(),
        "box_P2D": box_P2D,
        "table_RW": table_RW,
        "pages_R": pages_R,
        "tree_RX2D": tree_RX2D,
        "state_RX": torch.randint(-2, 10, tree_RX2D.shape[:2]).to(torch.int8),
        "span_P2": torch.cat([first_P1, first_P1 + 3], 1),
        **dict(zip(("sink_R", "from_R", "keep_R"), limits, strict=True)),
    }


def read_records(make: Maker) -> Call:
    reads, end = [], 0
    for _ in range(make.size(1, 3, 9)):
        length, end = make.size(1, 60, 200), end + make.random.choice((0, 0, 5))
        offset = make.random.choice((end, 0, len(_FILE) - 90))
        begin = make.random.randint(0, length)
        part = _FILE[offset + begin : offset + length]
        digest = xxhash.xxh3_128_digest(part if make.random.random() < 0.8 else b"")
        high, low = struct.unpack(">qq", digest)
        reads.append((offset, length, end, begin, length - begin, low, high))
        end += length
    reads_AX = torch.tensor(make.random.sample(reads, len(reads))).view(-1, 7)
    arena = torch.zeros(end + 3, dtype=torch.uint8)
    threads = make.random.choice((1, 1, 2))
    return {"fd": _file(), "reads_AX": reads_AX, "arena": arena, "threads": threads}


def copy_ranges(make: Maker) -> Call:
    rows, width, size = make.size(1, 3, 30), make.size(1, 5, 64, 100), make.random.randint(100, 300)
    to_A = torch.randperm(rows)[: make.size(1, 3, 20)]
    return {
        "target_PX": torch.randint(0, 256, (rows, width)).to(torch.uint8),
        "to_A": to_A,
        "source": torch.randint(0, 256, (size,)).to(torch.uint8),
        "begin_A": torch.randint(0, size - width + 1, to_A.shape),
        "threads": make.random.choice((1, 1, 2)),
    }


_FILE = random.Random(0).randbytes(4096)


@functools.cache
def _file() -> int:
    """A file in memory, open as long as this process runs."""
    fd = os.memfd_create("records")
    os.pwrite(fd, _FILE, 0)
    return fd


MAKERS: dict[str, Callable[[Maker], Call]] = {
    make.__name__: make
    for make in (
        *(
            decode_rows,
            attend_parts,
            decode_step,
            decode_steps,
            absorb_step,
            attention_sums,
            attend_sums,
            attend_blocks,
        ),
        *(estimate_blocks, match_keys, pack, unpack, channel_scores, gather_slots, scatter_slots),
        *(join_parts, read_records, page_bounds, score_pages, choose_pages, missed_mass),
        *(search_pages, score_cells, decode_chosen, copy_ranges),
    )
}


def some(name: str, seed: int) -> Call:
    """A call of an operator, mutated nine times out of ten."""
    torch.manual_seed(seed)
    call = MAKERS[name](Maker(seed))
    return mutated(call, seed) if seed % 10 else call


# What an entry may become: numbers that keep apart what must be, positions and pages of rows. Along
# one channel the cosines of all keys are alike, but for rounding.
ENTRIES: dict[str, tuple[int, ...]] = {
    "position_PS": (-1, 2**31 - 1, 2**31 - 2),
    "table_RW": (-(2**31), -1, 999, 2**31 - 1),
    "width": tuple(n for n in INTEGERS if n != 1),
    "address_A": (-(2**63), -1, 999, 2**40, 2**63 - 1),
    "fd": (-(2**63), -1, 2**31 - 1, 2**31, 2**63 - 1),  # no file that is open
}


def mutated(call: Call, seed: int) -> Call:
    """The call with one to three of its arguments changed."""
    rng, call = random.Random(seed), dict(call)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(list(call))
        call[name] = _changed(rng, name, call[name], call)
    return call


def _changed(rng: random.Random, name: str, value: Any, call: Call) -> Any:
    if isinstance(value, Tensor):
        done = value.layout is not torch.strided or any(n >= LARGE[0] for n in value.shape)
        return value if done else _tensor(rng, name, value, call)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(ENTRIES.get(name, INTEGERS))
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if isinstance(value, str):
        return rng.choice(("", "none", "frozen", "fresh", "mass", "position", "mass_per_age"))
    if isinstance(value, list) and value:
        return _list(rng, name, value, call)
    return value


def _list(rng: random.Random, name: str, values: list[Any], call: Call) -> list[Any]:
    values = list(values)
    kind = rng.random()
    if kind < 0.1:
        return values[:-1]
    if kind < 0.15:
        return values * rng.choice((2, 3))
    place = rng.randrange(len(values))
    # In a part of old slots the table and the positions are these.
    named = {3: "table_RW", 5: "position_PS"}.get(place % 8, name) if name == "tensors" else name
    changed = _changed(rng, named, values[place], call)
    values[place] = values[place] if changed is None else changed
    return values


def _tensor(rng: random.Random, name: str, x: Tensor, call: Call) -> Any:
    kind = rng.choice(("entry", "entry", "entry", "length", "dims", "dtype", "strides", "other"))
    if kind == "entry" and x.numel() and not (x.is_floating_point() or x.is_complex()):
        return _entry(rng, name, x)
    if kind == "length" and x.dim():
        return _length(rng, x)
    if kind == "dims":
        return x[None] if rng.random() < 0.5 or not x.dim() else x.flatten()
    if kind == "strides" and x.dim():
        return _strided(rng, x)
    if kind == "dtype" or kind == "entry":
        x = x.real if x.is_complex() else x
        return x.to(rng.choice(DTYPES))
    return _other(rng, name, x, call)


def _entry(rng: random.Random, name: str, x: Tensor) -> Tensor:
    if x.dtype == torch.bool:
        return ~x
    info = torch.iinfo(x.dtype)
    allowed = [n for n in ENTRIES.get(name, INTEGERS) if info.min <= n <= info.max]
    x = x.clone(memory_format=torch.contiguous_format)
    place = tuple(rng.randrange(n) for n in x.shape)
    x[place] = rng.choice(allowed or [info.max])
    return x


def _length(rng: random.Random, x: Tensor) -> Tensor:
    dim = rng.randrange(x.dim())
    kind = rng.random()
    if kind < 0.3:
        return x.narrow(dim, 0, 0)
    if kind < 0.6:
        return torch.cat([x, x], dim).contiguous()
    if kind < 0.8 or x.dim() < 2:
        return x.narrow(dim, 0, max(0, x.shape[dim] - 1)).contiguous()
    shape = list(x.shape)
    shape[dim], shape[dim - 1] = 0, rng.choice(LARGE)
    try:
        return x.new_empty(shape)
    except RuntimeError:  # more than PyTorch can count
        return x


def _strided(rng: random.Random, x: Tensor) -> Tensor:
    """The same numbers with gaps, or turned, or from an odd byte on."""
    kind, dim = rng.random(), rng.randrange(x.dim())
    if kind < 0.4:
        return x.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    if kind < 0.7:
        return x.transpose(0, dim).contiguous().transpose(0, dim)
    flat = x.flatten()
    return torch.cat([flat[:1], flat])[min(1, len(flat)) :].view(x.shape)


def _other(rng: random.Random, name: str, x: Tensor, call: Call) -> Any:
    kind = rng.random()
    if kind < 0.15:
        return x if name == "tensors" else None
    if kind < 0.25:
        return x.to_sparse() if x.dtype != torch.bool else x
    if kind < 0.4 and x.dim():
        return x[:1].expand(x.shape) if len(x) else x
    if kind < 0.5 and x.is_floating_point():
        return x.clone().requires_grad_()
    same = [y for y in call.values() if isinstance(y, Tensor) and y.dtype == x.dtype]
    return rng.choice(same) if same else x
