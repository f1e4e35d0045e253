"""Slots that stand for several tokens: the logarithm of their number, as a channel.

Adding log n to the logit of a slot gives it the weight of n equal tokens. Keys carry log n, which
is 0 for new tokens, and queries 1 / scaling, and no kernel needs to know.
"""

from __future__ import annotations

from collections.abc import Set

import torch

from kvpress.errors import PolicyError
from kvpress.run import Tokens
from kvpress.shapes import MOST_WIDTH


def check_counts(dtypes: Set[torch.dtype], key_width: int) -> None:
    """Raises PolicyError where a channel cannot hold the logarithm, or there is no room for it.

    key_width: channels of keys with that one. Half precision would round away what is added to
    slots that hold many tokens already.
    """
    if dtypes != {torch.float32} or key_width > MOST_WIDTH:
        raise PolicyError(
            f"Merged tokens are counted in a channel of keys: that needs float32, here are"
            f" {', '.join(sorted(map(str, dtypes)))}, keys of at most {MOST_WIDTH - 1} channels,"
            f" here are {key_width - 1}. Do not count them (count_bias=false)."
        )


def with_counts(tokens: Tokens) -> Tokens:
    """The tokens with one more channel in queries and keys. Raises PolicyError with a softcap."""
    if tokens.softcap:
        raise PolicyError(
            f"This model caps its logits at {tokens.softcap}, and with them the effect of counts."
            " Do not count merged tokens on this model (count_bias=false)."
        )
    query_BNP1, key_BHP1 = tokens.query_bNPD[..., :1], tokens.key_bHPD[..., :1]
    query_BNP1 = torch.full_like(query_BNP1, 1 / tokens.scaling)
    return tokens._replace(
        query_bNPD=torch.cat([tokens.query_bNPD, query_BNP1], dim=-1),
        key_bHPD=torch.cat([tokens.key_bHPD, torch.zeros_like(key_BHP1)], dim=-1),
    )
