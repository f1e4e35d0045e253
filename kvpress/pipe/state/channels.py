"""Channels that the engine adds to queries and keys, so that no kernel needs to know."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import PolicyError
from kvpress.formulas.hadamard import turned
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.recipe import Recipe
from kvpress.types import MOST_WIDTH, LayerKind, Turned

_BASE = 256

CHANNELS = 2  # a position as 256·a + b: half precision holds integers up to 256 exactly


def check_biases(recipe: Recipe, dtypes: Set[torch.dtype], key_width: int) -> None:
    """Raises PolicyError where a channel cannot hold biases, or there is no room for it.

    key_width: channels of keys with that one. Half precision would round away what is added to
    slots that hold many tokens already; biases that are fitted are written once.
    """
    if key_width > MOST_WIDTH:
        raise PolicyError(
            f"{recipe} keeps biases in a channel of keys: that needs keys of at most"
            f" {MOST_WIDTH - 1} channels, here are {key_width - 1}. Do without"
            " (count_bias=false, bias=false)."
        )
    if recipe.merging is not None and dtypes != {torch.float32}:
        raise PolicyError(
            f"Merged tokens are counted in a channel of keys: that needs float32, here are"
            f" {', '.join(sorted(map(str, dtypes)))}. Do not count them (count_bias=false)."
        )


def with_biases(tokens: Tokens) -> Tokens:
    """The tokens with one more channel in queries and keys. Raises PolicyError with a softcap."""
    if tokens.softcap:
        raise PolicyError(
            f"This model caps its logits at {tokens.softcap}, and with them the effect of biases."
            " Do not count merged tokens (count_bias=false), or fit values alone (bias=false)."
        )
    query_BNQ1, key_BHQ1 = tokens.query_bNQD[..., :1], tokens.key_bHQD[..., :1]
    query_BNQ1 = torch.full_like(query_BNQ1, 1 / tokens.scaling)
    return tokens._replace(
        query_bNQD=torch.cat([tokens.query_bNQD, query_BNQ1], dim=-1),
        key_bHQD=torch.cat([tokens.key_bHQD, torch.zeros_like(key_BHQ1)], dim=-1),
    )


def turns(recipe: Recipe) -> Turned:
    """What of a layer's tokens is turned before it is stored; see `Packing`."""
    return "none" if recipe.packing is None else recipe.packing.rotate


def with_turns(tokens: Tokens, what: Turned) -> Tokens:
    """The tokens with values, or everything, turned: products of queries and keys stay."""
    if what == "none":
        return tokens
    tokens = tokens._replace(value_bHQD=turned(tokens.value_bHQD))
    if what == "values":
        return tokens
    states = (turned(tokens.query_bNQD), turned(tokens.key_bHQD), tokens.value_bHQD)
    return tokens.with_states(*states)


def turned_query(query_BNQD: Tensor, recipe: Recipe) -> Tensor:
    """Queries as they meet stored keys, or back: it is the same."""
    return turned(query_BNQD) if turns(recipe) == "both" else query_BNQD


def turned_back(out_BNQE: Tensor, recipe: Recipe) -> Tensor:
    """The attention output over values as they came."""
    return out_BNQE if turns(recipe) == "none" else turned(out_BNQE)


def with_positions(
    tokens: Tokens, slopes: Sequence[float], seen_B: Tensor, valid_BQ: Tensor | None
) -> Tokens:
    """The tokens with `CHANNELS` more channels in queries and keys.

    slopes: of every query head, on scaled scores. seen_B: real tokens before these, on the host.
    """
    query_BNQD, key_BHQD = tokens.query_bNQD, tokens.key_bHQD
    batch, query_heads, new, _ = query_BNQD.shape
    offset_BQ = host.arange(new)[None] if valid_BQ is None else valid_BQ.cumsum(1) - 1
    position_BQ = (seen_B[:, None] + offset_BQ).clamp_min(0)
    parts_BQC = torch.stack([position_BQ // _BASE, position_BQ % _BASE], dim=-1)
    parts_B1QC = parts_BQC[:, None].to(key_BHQD)
    slope_N = host.tensor(slopes, dtype=torch.float64) / tokens.scaling
    slope_NC = torch.stack([slope_N * _BASE, slope_N], dim=-1).to(query_BNQD)
    query = slope_NC[None, :, None].expand(batch, query_heads, new, CHANNELS)
    key = parts_B1QC.expand(batch, key_BHQD.shape[1], new, CHANNELS)
    return tokens._replace(
        query_bNQD=torch.cat([query_BNQD, query], dim=-1),
        key_bHQD=torch.cat([key_BHQD, key], dim=-1),
    )


def extra(kind: LayerKind, recipe: Recipe) -> int:
    """How many channels stand in stored keys behind the model's."""
    return (CHANNELS if kind.slopes else 0) + biased(recipe)


def biased(recipe: Recipe) -> bool:
    """Whether the last channel of a stored key is added to its logits."""
    counts = recipe.merging is not None and recipe.merging.counts
    return counts or (recipe.fit is not None and recipe.fit.bias is not None)
