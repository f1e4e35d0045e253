"""Which blocks of a prompt's attention a layer computes, where its policy leaves some out."""

from __future__ import annotations

from torch import Tensor

from kvpress import ops
from kvpress.formulas.block_map import Blocks, computed_blocks, of_slots, to_map
from kvpress.formulas.codes import Codes, quantise_keys, quantise_queries
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.ledger import count_blocks
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.sparsity import Thresholds
from kvpress.types import EMPTY, MOST_CODED


def choose(
    layer: Layer, tokens: Tokens, key_bHSD: Tensor, position_bHS: Tensor, trains: bool
) -> Tensor | None:
    """The bit map of the blocks to compute, uint8 `[b, N, X]`; None for all of them.

    trains: whether gradients are recorded, which only exact attention has. The blocks are counted
    for the report, which also says why attention was computed in full.
    """
    limits = layer.context.thresholds
    if limits is None:
        return None
    why = "passes that record gradients" if trains else None
    why = why or _why_in_full(layer, tokens, position_bHS, limits)
    if why:
        layer.context.ledger.note(f"Attention was computed in full for {why}.")
        return None
    tau_N = layer.kind.own(limits.tau_LN[layer.context.layers.index(layer)])
    map_bNX = block_map(tokens.query_bNQD, key_bHSD, tokens.scaling, tau_N, limits.local)
    blocks = Blocks(tokens.query_bNQD.shape[2], key_bHSD.shape[2])
    count_blocks(layer, computed_blocks(map_bNX), blocks.causal)
    return map_bNX


def _why_in_full(
    layer: Layer, tokens: Tokens, position_bHS: Tensor, limits: Thresholds
) -> str | None:
    """For which prompts and layers no block can be left out, if this is one of them."""
    if layer.kind.window is not None:
        return "sliding-window layers"
    if tokens.softcap:
        return "layers with a cap on their logits"
    if tokens.query_bNQD.shape[3] > MOST_CODED:
        return f"heads of more than {MOST_CODED} channels"
    if layer.kind.slopes is not None:
        return "layers with ALiBi"
    if len(layer.kind.own(limits.tau_LN[0])) != tokens.query_bNQD.shape[1]:
        return "layers whose number of query heads is not the model's"
    if tokens.query_bNQD.shape[2] < limits.least:
        return f"prompts of fewer than {limits.least:,} new tokens"
    if bool((position_bHS == EMPTY).any()):
        return "prompts that go on from rows of different lengths"
    return None


def sparse_attention(
    query_BNQD: Tensor,
    key_BHSD: Tensor,
    value_BHSE: Tensor,
    scaling: float,
    tau_N: Tensor,
    local: int,
) -> tuple[Tensor, Tensor]:
    """Attention `[B, N, Q, E]` of the last Q slots' queries, and the blocks computed `[B, N]`."""
    map_BNX = block_map(query_BNQD, key_BHSD, scaling, tau_N, local)
    out_BNQE, _ = ops.attend_blocks(query_BNQD, key_BHSD, value_BHSE, map_BNX, scaling)
    return out_BNQE, computed_blocks(map_BNX)


def block_map(
    query_BNQD: Tensor, key_BHSD: Tensor, scaling: float, tau_N: Tensor, local: int
) -> Tensor:
    """The bit map of blocks to compute: uint8 `[B, N, X]`, see formulas/block_map.py."""
    keys, own = quantise_keys(key_BHSD), quantise_queries(query_BNQD)
    bound_BNQ = thresholds(query_BNQD, key_BHSD, keys.mean, scaling, tau_N, local)
    shift_BNS = lost_by_smoothing(own.mean, keys)
    return ops.estimate_blocks(
        own.code, own.scale, keys.code, keys.scale, shift_BNS, bound_BNQ, local
    )


def thresholds(
    query_BNQD: Tensor,
    key_BHSD: Tensor,
    mean_BH1D: Tensor,
    scaling: float,
    tau_N: Tensor,
    local: int,
) -> Tensor:
    """The least q · k' that counts, of every query: fp32 `[B, N, Q]`.

    With l = Σ exp(σ q·k') over the first block and the local area, exact, and keys less their mean:
    exp(σ q·k') / l > τ is q·k' > (ln τ + ln l) / σ.
    """
    batch, heads, queries, _ = query_BNQD.shape
    blocks = Blocks(queries, key_BHSD.shape[2])
    always_BNIJ = blocks.always(local, query_BNQD.device).expand(batch, heads, -1, -1)
    always_BNX = to_map(always_BNIJ, blocks)
    _, lse_BNQ = ops.attend_blocks(query_BNQD, key_BHSD, key_BHSD[..., :0], always_BNX, scaling)
    # This LSE is that of whole keys: that of smoothed ones lacks q · k̄.
    moved_BNQ = _products(query_BNQD.float(), mean_BH1D).view(batch, heads, queries)
    tau_N1 = tau_N.to(lse_BNQ.device)[:, None]
    return ((lse_BNQ + tau_N1.log()) / scaling - moved_BNQ).contiguous()


def lost_by_smoothing(mean_BN1D: Tensor, keys: Codes) -> Tensor:
    """q̄ · k' in units of the scale of each key: what smoothing the queries took from logits."""
    own_BHGS = _products(mean_BN1D, keys.smooth)
    own_BHGS /= of_slots(keys.scale, own_BHGS.shape[-1])[:, :, None]
    return own_BHGS.flatten(1, 2)


def _products(query_BNQD: Tensor, key_BHSD: Tensor) -> Tensor:
    """q · k of every query head and the keys of its group: fp32 `[B, H, G·Q, S]`."""
    batch, heads, _, width = key_BHSD.shape
    return query_BNQD.reshape(batch, heads, -1, width) @ key_BHSD.mT
