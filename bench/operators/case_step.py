"""The cases of `decode_step`, beside `decode_rows`, which only attends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kvpress.bench.common.timing import Call
from kvpress.bench.operators import probe
from kvpress.bench.operators.case_rows import attend, copies_of, smaller
from kvpress.bench.operators.registry import Case, difference
from kvpress.bench.operators.rows import SEED, Rows, RowsShape, exact_attention, make_rows
from torch import Tensor

from kvpress import ops
from kvpress.formulas.merging import Merging
from kvpress.formulas.noise import uniform
from kvpress.ops import Bounds, Columns, Logits, Noise, Token, Turning

RECENT = 0.3  # of the tokens seen are protected, as in Keyformer (arXiv 2403.09054)
COLUMN_BYTES = 12  # per slot: position read, mass read and written
STEPS = 3  # of a check; later ones read what earlier ones evicted
LAYER = 2
MERGING = Merging(own=2.7, memory=0.3, gain=0.7)


def decode_step_case(shape: RowsShape, rotation: int) -> Case:
    """Append, attend, accumulate with fresh noise and evict one, all rows at their quotas.

    `decode_rows` beside it only attends; `absorb_step` is the step of a policy that merges: both
    operators, which read the keys once more.
    """
    rows = shape.batch * shape.heads
    appended = rows * 2 * shape.width * shape.dtype.itemsize
    merged = sum(shape.lengths) * shape.width * shape.dtype.itemsize
    size = shape.bytes + appended + (sum(shape.lengths) + rows) * COLUMN_BYTES
    return Case(
        group="decode_step",
        name=shape.name,
        parameters={**shape.parameters, "rank": "mass", "noise": "fresh", "recent": RECENT},
        bytes=size,
        flops=shape.flops,
        bound="bytes",
        prepare=partial(_prepare, shape, size, rotation),
        check=partial(_check, shape),
        other_work={"decode_rows": shape.bytes, "absorb_step": size + merged},
    )


@dataclass(frozen=True)
class Step:
    """The operands of `decode_step`, which changes the pools, the columns and the counts.

    A call appends one slot to each row and evicts one, so that calls can be repeated for ever.
    """

    rows: Rows
    key_BH1D: Tensor
    value_BH1E: Tensor
    position_PS: Tensor
    mass_PS: Tensor
    seen_B: Tensor
    quota_R: Tensor
    recent_R: Tensor
    sink_B: Tensor
    threshold_B: Tensor

    @property
    def columns(self) -> Columns:
        """Positions and masses, as operators take them."""
        return Columns(self.position_PS, self.mass_PS)

    @property
    def bounds(self) -> Bounds:
        """Which slots stay, as operators take it."""
        return Bounds(self.seen_B, self.quota_R, self.recent_R, self.sink_B, "mass")

    def run(self, operator: Callable[..., Any], scaling: float, evict: bool = True) -> Tensor:
        """The next decode step of these rows."""
        # Part of what is timed, as it is part of a step: one addition per sequence.
        self.seen_B.add_(1)
        rows = self.rows
        out: Tensor = operator(
            Token(rows.query_BN1D, self.key_BH1D, self.value_BH1E),
            rows.pages,
            self.columns,
            self.bounds,
            evict,
            Noise("fresh", 1.0, SEED, LAYER),
            Logits(scaling),
        )
        return out

    def run_merging(self, scaling: float) -> Tensor:
        """The same, but the slot that goes is merged into the one with the nearest key."""
        out = self.run(ops.decode_step, scaling, evict=False)
        rows = self.rows
        held, width = (rows.pages, self.columns, self.bounds), rows.key_PDS.shape[1]
        ops.absorb_step(*held, self.threshold_B, Turning(), width, MERGING)
        return out

    def copy(self) -> Step:
        """The same in fresh memory."""
        tensors = (value.clone() for name, value in vars(self).items() if name != "rows")
        return Step(self.rows.copy(), *tensors)

    def held(self) -> list[Tensor]:
        """Positions, masses, keys and values of every slot held, each row by position."""
        page_slots, counts = self.position_PS.shape[1], self.rows.counts_R.tolist()
        parts = []
        for r, count in enumerate(counts):
            pages = self.rows.table_RW[r, : -(-count // page_slots)].long()
            position_S = self.position_PS[pages].flatten()[:count]
            order = position_S.argsort()
            key_SD = self.rows.key_PDS[pages].transpose(1, 2).flatten(0, 1)[order]
            value_SE = self.rows.value_PSE[pages].flatten(0, 1)[order]
            mass_S = self.mass_PS[pages].flatten()[order]
            parts.append((position_S[order], mass_S, key_SD, value_SE))
        return [torch.cat(column) for column in zip(*parts, strict=True)]


def make_step(shape: RowsShape, device: torch.device) -> Step:
    """Rows at their quotas with room for one slot more, spread over a longer sequence."""
    rows = make_rows(shape, device, room=1)
    counts_BH = rows.counts_R.view(shape.batch, shape.heads)
    seen_B = 2 * counts_BH.amax(1)
    pool = (len(rows.key_PDS), shape.page_slots)
    position_PS = torch.zeros(pool, dtype=torch.int32, device=device)
    for r, count in enumerate(rows.counts_R.tolist()):
        pages = rows.table_RW[r, : -(-count // shape.page_slots)].long()
        slot_S = torch.arange(len(pages) * shape.page_slots, device=device)
        seen = int(seen_B[r // shape.heads])
        position_PS[pages] = (slot_S * seen // count).to(torch.int32).view(-1, shape.page_slots)
    token = (shape.batch, shape.heads, 1, shape.width)
    return Step(
        rows,
        torch.randn(token, device=device),
        torch.randn(token, device=device),
        position_PS,
        torch.rand(pool, device=device),
        seen_B,
        rows.counts_R.clone(),
        (seen_B * RECENT).long().repeat_interleave(shape.heads),
        torch.zeros_like(seen_B),
        torch.zeros(shape.batch, device=device),
    )


def _prepare(shape: RowsShape, size: int, rotation: int, device: torch.device) -> dict[str, Call]:
    step = make_step(shape, device)
    others = copies_of(step.rows.copy(), shape, rotation)
    steps = [step, *(step.copy() for _ in others[1:])]
    return {
        "probe": probe.memory(size, device, rotation),
        "decode_rows": partial(attend, others, shape.scaling),
        "decode_step": lambda number: steps[number % len(steps)].run(
            ops.decode_step, shape.scaling
        ),
        "absorb_step": lambda number: steps[number % len(steps)].run_merging(shape.scaling),
    }


def _check(shape: RowsShape, device: torch.device) -> str | None:
    """Outputs and masses by the tolerance rule; what else is held after a few steps exactly."""
    small = smaller(shape)
    given = make_step(small, device)
    plain = given.copy()
    reference = ops.implementation("decode_step", "reference")
    mass_RT = _mass_by_position(given)
    for number in range(STEPS):
        exact, _ = exact_attention(_appended(given), small.scaling)
        _add_exact_sums(mass_RT, given, small)
        outs = given.run(ops.decode_step, small.scaling), plain.run(reference, small.scaling)
        wrong = difference(f"out of step {number}", *outs, exact)
        if wrong is not None:
            return wrong
        if not torch.equal(given.rows.counts_R, plain.rows.counts_R):
            return f"step {number} leaves other counts than the reference"
    names = ("positions", "masses", "keys", "values")
    held = dict(zip(names, zip(given.held(), plain.held(), strict=True), strict=True))
    for name in ("positions", "keys", "values"):
        if not torch.equal(*held[name]):
            return f"the {name} held after {STEPS} steps differ from the reference's"
    row_A = torch.arange(len(mass_RT), device=device).repeat_interleave(given.rows.counts_R)
    return difference("masses", *held["masses"], mass_RT[row_A, held["positions"][0].long()])


def _mass_by_position(step: Step) -> Tensor:
    """The masses of the slots held, by row and position, with room for the steps: float64."""
    tokens = int(step.seen_B.max()) + STEPS
    counts_R = step.rows.counts_R
    mass_RT = torch.zeros(len(counts_R), tokens, dtype=torch.double, device=counts_R.device)
    position_N, mass_N = step.held()[:2]
    row_A = torch.arange(len(counts_R), device=counts_R.device).repeat_interleave(counts_R)
    mass_RT[row_A, position_N.long()] = mass_N.double()
    return mass_RT


def _add_exact_sums(mass_RT: Tensor, step: Step, shape: RowsShape) -> None:
    """Adds what the next step's token gives to every slot, in float64 with the engine's numbers."""
    rows, group = _appended(step), shape.group
    query_RGD = rows.query_BN1D.double().view(len(mass_RT), group, shape.width)
    for r, count in enumerate(rows.counts_R.tolist()):
        pages = rows.table_RW[r, : -(-count // shape.page_slots)].long()
        key_DS = rows.key_PDS[pages].transpose(0, 1).flatten(1)[:, :count].double()
        position_S = step.position_PS[pages].flatten()[:count].long()
        own = step.seen_B[r // shape.heads]
        position_S[-1] = own
        head_G1 = (r % shape.heads * group + torch.arange(group, device=own.device))[:, None]
        uniform_GS = uniform(SEED, LAYER, head_G1, own.view(1, 1), position_S[None])
        gumbel_GS = -(-uniform_GS.double().log()).log()
        noisy_GS = query_RGD[r] @ key_DS * shape.scaling + gumbel_GS
        mass_RT[r, position_S] += noisy_GS.softmax(-1).sum(0)


def _appended(step: Step) -> Rows:
    """A copy of the rows with the new token behind each."""
    rows = step.rows.copy()
    page_slots = rows.key_PDS.shape[2]
    page_R = rows.table_RW.gather(1, (rows.counts_R // page_slots)[:, None]).flatten().long()
    offset_R = rows.counts_R % page_slots
    rows.key_PDS[page_R, :, offset_R] = step.key_BH1D.flatten(0, 2).to(rows.key_PDS.dtype)
    rows.value_PSE[page_R, offset_R] = step.value_BH1E.flatten(0, 2).to(rows.value_PSE.dtype)
    rows.counts_R.add_(1)
    return rows
