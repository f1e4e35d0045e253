"""PyTorch reference of `attention_sums`: one pass over blocks of queries."""

from __future__ import annotations

import torch
from kvpress.csrc.decode_step.reference import check_noise
from torch import Tensor

from kvpress.formulas.block_map import QUERIES, SLOTS, Blocks, from_map
from kvpress.formulas.noise import NO_QUERY, exponential
from kvpress.ops import shapes
from kvpress.types import EMPTY

BLOCK_ELEMENTS = 1 << 20  # logits per block: 4 MiB in fp32, which stays near the cores


def attention_sums(
    query_BNPD: Tensor,
    key_BHSD: Tensor,
    position_BHS: Tensor,
    scaling: float,
    softcap: float,
    window: int,
    noise: str,
    tau: float,
    seed: int,
    layer: int,
    map_BNX: Tensor | None = None,
) -> Tensor:
    """Attention that each slot receives from the last `window` queries: fp32 `[B, N, S]`.

    The P queries belong to the last P slots, in order; query i sees
    slots 0 … S − P + i that hold a token (position >= 0), of the blocks of the map where there is
    one; it adds nothing where it sees none. See README.md for the formulas of the three kinds of
    noise. Raises OperatorError.
    """
    check(query_BNPD, key_BHSD, position_BHS, scaling, softcap, window, noise, tau, map_BNX)
    batch, query_heads, queries, width = query_BNPD.shape
    heads, slots = key_BHSD.shape[1:3]
    group = query_heads // heads
    key_BHSD = key_BHSD.float()  # scores are fp32 whatever the model computes in
    query_BHGPD = query_BNPD.float().reshape(batch, heads, group, queries, width)
    head_HG11 = torch.arange(query_heads, device=query_BNPD.device).view(heads, group, 1, 1)
    position_BHS = position_BHS.clamp_min(EMPTY)
    key_position_BH11S = position_BHS[:, :, None, None]
    empty_BH11S = key_position_BH11S < 0
    any_empty = bool(empty_BH11S.any())
    sums_BHGS = torch.zeros(
        batch, heads, group, slots, device=query_BNPD.device, dtype=torch.float32
    )

    computed_BNIJ = None
    if map_BNX is not None:
        computed_BNIJ = from_map(map_BNX, Blocks(queries, slots))
    some_hidden = any_empty or computed_BNIJ is not None
    frozen_BHG1S = None
    if noise == "frozen":
        no_query = torch.full_like(key_position_BH11S[..., :1], NO_QUERY)
        frozen_BHG1S = exponential(seed, layer, head_HG11, no_query, key_position_BH11S)

    step = max(1, BLOCK_ELEMENTS // max(1, batch * query_heads * slots))
    for start in range(max(0, queries - window), queries, step):
        stop = min(start + step, queries)
        seen = slots - queries + stop  # later slots are in the future of the whole block
        # The group is folded into the queries, so that the matrix product never expands the keys.
        block_BHMD = (query_BHGPD[:, :, :, start:stop] * scaling).flatten(2, 3)
        x_BHGps = torch.matmul(block_BHMD, key_BHSD[:, :, :seen].mT)
        x_BHGps = x_BHGps.view(batch, heads, group, stop - start, seen)
        if softcap:
            x_BHGps = torch.tanh(x_BHGps / softcap) * softcap
        own_p = torch.arange(slots - queries + start, seen, device=x_BHGps.device)
        future_pp = own_p > own_p[:, None]
        x_BHGps[..., slots - queries + start :].masked_fill_(future_pp, -torch.inf)
        if any_empty:
            x_BHGps.masked_fill_(empty_BH11S[..., :seen], -torch.inf)
        if computed_BNIJ is not None:
            row_p = torch.arange(start, stop, device=x_BHGps.device) // QUERIES
            of_rows_BNpJ = computed_BNIJ[:, :, row_p]
            chosen_BNps = of_rows_BNpJ.repeat_interleave(SLOTS, -1)[..., :seen]
            x_BHGps.masked_fill_(~chosen_BNps.view_as(x_BHGps), -torch.inf)

        if frozen_BHG1S is not None and tau == 1.0:
            # N_q = Σ_j A_qj·exp(ζ_j), so that one ordinary softmax gives the noisy sums (README,
            # identity).
            w_BHGps = _softmax(x_BHGps, some_hidden)
            boost_BHG1s = frozen_BHG1S[..., :seen].reciprocal()
            norm_BHGp1 = torch.matmul(w_BHGps, boost_BHG1s.mT)
            if some_hidden:
                norm_BHGp1.masked_fill_(norm_BHGp1 == 0, 1.0)
            sums = torch.matmul(norm_BHGp1.reciprocal().mT, w_BHGps) * boost_BHG1s
            sums_BHGS[..., :seen] += sums.squeeze(3)
            continue
        if frozen_BHG1S is not None:
            x_BHGps -= frozen_BHG1S[..., :seen].log()
        elif noise == "fresh":
            query_position_BH1p1 = position_BHS[:, :, None, slots - queries + start : seen, None]
            x_BHGps -= exponential(
                seed, layer, head_HG11, query_position_BH1p1, key_position_BH11S[..., :seen]
            ).log_()
        if tau != 1.0:
            x_BHGps /= tau
        sums_BHGS[..., :seen] += _softmax(x_BHGps, some_hidden).sum(3)
    return sums_BHGS.flatten(1, 2)


def _softmax(x_BHGps: Tensor, some_hidden: bool) -> Tensor:
    """Weights; zeros for a query that sees no slot."""
    w_BHGps = x_BHGps.softmax(-1)
    if some_hidden:
        w_BHGps = w_BHGps.masked_fill(x_BHGps.amax(-1, keepdim=True) == -torch.inf, 0.0)
    return w_BHGps


def check(
    query_BNPD: Tensor,
    key_BHSD: Tensor,
    position_BHS: Tensor,
    scaling: float,
    softcap: float,
    window: int,
    noise: str,
    tau: float,
    map_BNX: Tensor | None = None,
    holes: bool = True,
) -> None:
    """Raises OperatorError for operands that do not fit together."""
    op = "attention_sums"
    named = {"query_BNPD": query_BNPD, "key_BHSD": key_BHSD}
    lengths = shapes.bind(op, {**named, "position_BHS": position_BHS})
    shapes.floating(op, named)
    if position_BHS.dtype != torch.int64:
        shapes.refuse(op, f"position_BHS is {position_BHS.dtype}; it must be torch.int64")
    shapes.prompt(op, lengths)
    if position_BHS.device.type == "cpu":
        least, most = (int(x) for x in position_BHS.aminmax())
        if most > shapes.MOST_SLOTS or (least < 0 and not holes):
            rule = "" if holes else "; every slot of a whole prompt holds a token, from 0 on"
            shapes.refuse(op, f"positions are {least} to {most}, at most {shapes.MOST_SLOTS}{rule}")
    if window < 0:
        shapes.refuse(op, f"window is {window}; it must not be negative")
    check_noise(op, noise, tau)
    shapes.logits(op, scaling, softcap)
    if map_BNX is not None:
        check_map(op, map_BNX, lengths, softcap)


def check_map(op: str, map_BNX: Tensor, lengths: dict[str, int], softcap: float) -> None:
    """Raises OperatorError for a map that is not of this prompt."""
    shape = (lengths["B"], lengths["N"], Blocks(lengths["P"], lengths["S"]).offsets[-1])
    shapes.of_dtype(op, torch.uint8, {"map_BNX": map_BNX})
    if tuple(map_BNX.shape) != shape:
        shapes.refuse(
            op, f"map_BNX is {map_BNX.dtype} {list(map_BNX.shape)}; it must be uint8 {list(shape)}"
        )
    if softcap:
        shapes.refuse(op, f"softcap={softcap} with a map; give one of them")
