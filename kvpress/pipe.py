"""The pipe of one layer: new tokens in, attention output out, rows at their quotas."""

from __future__ import annotations

from torch import Tensor

from kvpress.decode import run_decode
from kvpress.layer import Layer, Tokens
from kvpress.prompt import run_prompt


def attend(layer: Layer, tokens: Tokens) -> Tensor:
    """Attention output `[B, N, P, D]` of new tokens, which are then stored and compressed.

    One new token per sequence is a decode step unless a sequence has no token yet; everything else
    is a prompt. Raises BudgetError before anything changes.
    """
    if layer.store is None:
        layer.start(tokens.key_BHPD, tokens.value_BHPD)
    new, before_B = tokens.key_BHPD.shape[2], layer.seen_B
    after_B = before_B + (new if tokens.valid_BP is None else tokens.valid_BP.sum(1))
    decoding = new == 1 and bool((before_B > 0).all())
    if not decoding:
        layer.set_quotas(after_B)
    layer.advance(new, after_B, padded=tokens.valid_BP is not None)
    run = run_decode if decoding else run_prompt
    return run(layer, tokens, before_B)
