"""PyTorch reference of `attention_sums`: one pass over blocks of queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kvpress.csrc.attention_sums import Operands
from kvpress.csrc.decode_step.reference import check_noise
from torch import Tensor

from kvpress.formulas.block_map import QUERIES, SLOTS, Blocks, from_map
from kvpress.formulas.noise import NO_QUERY, exponential
from kvpress.ops import shapes
from kvpress.ops.operands import Logits, Noise, Reduction
from kvpress.types import EMPTY

BLOCK_ELEMENTS = 1 << 20  # logits per block: 4 MiB in fp32, which stays near the cores


class Prompt(NamedTuple):
    """What blocks of queries share: fp32, whatever the model computes in."""

    query_BHGQD: Tensor  # times the scaling
    key_BHSD: Tensor
    position_BHS: Tensor
    head_HG11: Tensor
    empty_BH11S: Tensor | None  # slots without a token; None: there are none
    computed_BNIJ: Tensor | None  # blocks that are attended to; None: all of them

    @property
    def hides(self) -> bool:
        """Whether a query may see no slot at all."""
        return self.empty_BH11S is not None or self.computed_BNIJ is not None


def attention_sums(operands: Operands) -> Tensor:
    """Attention that each slot receives from the last `window` queries: fp32 `[B, N, S]`.

    Its sum or its largest part. The Q queries belong to the last Q slots, in order; query i sees
    slots 0 … S − Q + i that hold a token (position >= 0), of the blocks of the map where there is
    one; it gives nothing where it sees none. See README.md for the formulas of the three kinds of
    noise. Raises OperatorError.
    """
    check(operands)
    prompt = _prompt(operands)
    batch, heads, group, queries, _ = prompt.query_BHGQD.shape
    slots = prompt.key_BHSD.shape[2]
    window, largest, weight_BQ = operands.reduction
    sums_BHGS = prompt.key_BHSD.new_zeros(batch, heads, group, slots)
    frozen_BHG1S = _frozen(prompt, operands.noise)
    step = max(1, BLOCK_ELEMENTS // max(1, batch * heads * group * slots))
    for start in range(max(0, queries - window), queries, step):
        stop = min(start + step, queries)
        x_BHGqs = _logits(prompt, operands.logits, start, stop)
        given_BHGS = sums_BHGS[..., : x_BHGqs.shape[-1]]
        own_Bq = None if weight_BQ is None else weight_BQ[:, start:stop]
        if largest:
            w_BHGqs = _weighted(_softmax(x_BHGqs, prompt.hides), own_Bq)
            given_BHGS.copy_(given_BHGS.maximum(w_BHGqs.amax(3)))
        else:
            given_BHGS += _sums(prompt, operands.noise, frozen_BHG1S, x_BHGqs, own_Bq)
    return sums_BHGS.flatten(1, 2)


def _prompt(operands: Operands) -> Prompt:
    query_BNQD, key_BHSD, position_BHS, logits, *_, map_BNX = operands
    query_heads, queries = query_BNQD.shape[1:3]
    heads, slots = key_BHSD.shape[1:3]
    query_BHGQD = torch.unflatten(query_BNQD.float(), 1, (heads, -1)) * logits.scaling
    head_N = torch.arange(query_heads, device=query_BNQD.device) + operands.noise.first
    head_HG11 = head_N.view(heads, -1, 1, 1)
    position_BHS = position_BHS.clamp_min(EMPTY)
    empty_BH11S = position_BHS[:, :, None, None] < 0
    computed_BNIJ = None if map_BNX is None else from_map(map_BNX, Blocks(queries, slots))
    empty = empty_BH11S if bool(empty_BH11S.any()) else None
    return Prompt(query_BHGQD, key_BHSD.float(), position_BHS, head_HG11, empty, computed_BNIJ)


def _frozen(prompt: Prompt, noise: Noise) -> Tensor | None:
    """The numbers of noise that are drawn once per key, if it is of that kind."""
    if noise.noise != "frozen":
        return None
    position_BH11S = prompt.position_BHS[:, :, None, None]
    no_query = torch.full_like(position_BH11S[..., :1], NO_QUERY)
    return exponential(noise.seed, noise.layer, prompt.head_HG11, no_query, position_BH11S)


def _logits(prompt: Prompt, logits: Logits, start: int, stop: int) -> Tensor:
    """Logits of some queries with all slots that one of them sees; -inf for what is hidden."""
    batch, heads, group, queries, _ = prompt.query_BHGQD.shape
    first = prompt.key_BHSD.shape[2] - queries  # the slot of the first query
    seen = first + stop  # later slots are in the future of the whole block
    # The group is folded into the queries, so that the matrix product never expands the keys.
    block_BHMD = prompt.query_BHGQD[:, :, :, start:stop].flatten(2, 3)
    x_BHGqs = torch.matmul(block_BHMD, prompt.key_BHSD[:, :, :seen].mT)
    x_BHGqs = x_BHGqs.view(batch, heads, group, stop - start, seen)
    if logits.softcap:
        x_BHGqs = torch.tanh(x_BHGqs / logits.softcap) * logits.softcap
    own_q = torch.arange(first + start, seen, device=x_BHGqs.device)
    x_BHGqs[..., first + start :].masked_fill_(own_q > own_q[:, None], -torch.inf)
    if prompt.empty_BH11S is not None:
        x_BHGqs.masked_fill_(prompt.empty_BH11S[..., :seen], -torch.inf)
    if prompt.computed_BNIJ is not None:
        row_p = torch.arange(start, stop, device=x_BHGqs.device) // QUERIES
        chosen_BNqs = prompt.computed_BNIJ[:, :, row_p].repeat_interleave(SLOTS, -1)[..., :seen]
        x_BHGqs.masked_fill_(~chosen_BNqs.view_as(x_BHGqs), -torch.inf)
    return x_BHGqs


def _sums(
    prompt: Prompt,
    noise: Noise,
    frozen_BHG1S: Tensor | None,
    x_BHGqs: Tensor,
    own_Bq: Tensor | None,
) -> Tensor:
    """What slots receive of some queries, from their logits, which are overwritten."""
    queries, seen = x_BHGqs.shape[3:]
    if frozen_BHG1S is not None and noise.tau == 1.0:
        # N_q = Σ_j A_qj·exp(ζ_j), so that one ordinary softmax gives the noisy sums (README,
        # identity).
        w_BHGqs = _softmax(x_BHGqs, prompt.hides)
        boost_BHG1s = frozen_BHG1S[..., :seen].reciprocal()
        norm_BHGq1 = torch.matmul(w_BHGqs, boost_BHG1s.mT)
        if prompt.hides:
            norm_BHGq1.masked_fill_(norm_BHGq1 == 0, 1.0)
        part_BHGq1 = _weighted(norm_BHGq1.reciprocal(), own_Bq)
        return (torch.matmul(part_BHGq1.mT, w_BHGqs) * boost_BHG1s).squeeze(3)
    if frozen_BHG1S is not None:
        x_BHGqs -= frozen_BHG1S[..., :seen].log()
    elif noise.noise == "fresh":
        key_BH11s = prompt.position_BHS[:, :, None, None, :seen]
        query_BH1p1 = prompt.position_BHS[:, :, None, seen - queries : seen, None]
        x_BHGqs -= exponential(
            noise.seed, noise.layer, prompt.head_HG11, query_BH1p1, key_BH11s
        ).log_()
    if noise.tau != 1.0:
        x_BHGqs /= noise.tau
    return _weighted(_softmax(x_BHGqs, prompt.hides), own_Bq).sum(3)


def _weighted(x_BHGqX: Tensor, own_Bq: Tensor | None) -> Tensor:
    """Numbers of queries times the weights of these, where they have any."""
    return x_BHGqX if own_Bq is None else x_BHGqX * own_Bq[:, None, None, :, None]


def _softmax(x_BHGqs: Tensor, some_hidden: bool) -> Tensor:
    """Weights; zeros for a query that sees no slot."""
    w_BHGqs = x_BHGqs.softmax(-1)
    if some_hidden:
        w_BHGqs = w_BHGqs.masked_fill(x_BHGqs.amax(-1, keepdim=True) == -torch.inf, 0.0)
    return w_BHGqs


def check(operands: Operands, holes: bool = True) -> None:
    """Raises OperatorError for operands that do not fit together. holes: whether slots may be."""
    op = "attention_sums"
    query_BNQD, key_BHSD, position_BHS, logits, reduction, noise, map_BNX = operands
    named = {"query_BNQD": query_BNQD, "key_BHSD": key_BHSD}
    weight_BQ = reduction.weight_BQ
    more = {"position_BHS": position_BHS} | ({} if weight_BQ is None else {"weight_BQ": weight_BQ})
    lengths = shapes.bind(op, named | more)
    shapes.floating(op, named)
    if position_BHS.dtype != torch.int64:
        shapes.refuse(op, f"position_BHS is {position_BHS.dtype}; it must be torch.int64")
    shapes.prompt(op, lengths)
    if position_BHS.device.type == "cpu":
        least, most = (int(x) for x in position_BHS.aminmax())
        if most > shapes.MOST_SLOTS or (least < 0 and not holes):
            rule = "" if holes else "; every slot of a whole prompt holds a token, from 0 on"
            shapes.refuse(op, f"positions are {least} to {most}, at most {shapes.MOST_SLOTS}{rule}")
    check_noise(op, noise)
    check_reduction(op, reduction, noise)
    shapes.logits(op, *logits)
    if map_BNX is not None:
        check_map(op, map_BNX, lengths, logits.softcap)


def check_reduction(op: str, reduction: Reduction, noise: Noise) -> None:
    """Raises OperatorError for a reduction that is none, or not of these weights."""
    window, largest, weight_BQ = reduction
    if window < 0:
        shapes.refuse(op, f"window is {window}; it must not be negative")
    if largest and (noise.noise != "none" or noise.tau != 1.0):
        given = f"noise={noise.noise!r}, tau={noise.tau}"
        shapes.refuse(op, f"{given} with the largest weights; they are those without noise, tau=1")
    if weight_BQ is None:
        return
    shapes.of_dtype(op, torch.float32, {"weight_BQ": weight_BQ})
    if weight_BQ.device.type == "cpu" and not bool(((weight_BQ >= 0) & weight_BQ.isfinite()).all()):
        shapes.refuse(op, "weight_BQ holds negative or infinite numbers, or none; give others")


def check_map(op: str, map_BNX: Tensor, lengths: dict[str, int], softcap: float) -> None:
    """Raises OperatorError for a map that is not of this prompt."""
    shape = (lengths["B"], lengths["N"], Blocks(lengths["Q"], lengths["S"]).offsets[-1])
    shapes.of_dtype(op, torch.uint8, {"map_BNX": map_BNX})
    if tuple(map_BNX.shape) != shape:
        shapes.refuse(
            op, f"map_BNX is {map_BNX.dtype} {list(map_BNX.shape)}; it must be uint8 {list(shape)}"
        )
    if softcap:
        shapes.refuse(op, f"softcap={softcap} with a map; give one of them")
