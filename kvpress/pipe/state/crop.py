"""Taking tokens back: where that is exact, and how."""

from __future__ import annotations

from kvpress.errors import CacheError
from kvpress.host import lasting
from kvpress.pipe.state.layer import Layer


def is_croppable(layer: Layer) -> bool:
    """Whether any tokens decoded from now on can be taken back exactly."""
    steady = layer.limits is None or layer.limits.interval == 0
    exact = not layer.recipe.gathers and not layer.recipe.formats
    return layer.context.recording.on or (steady and exact)


def check_crop(layer: Layer, tokens: int) -> None:
    """Raises CacheError where forgetting the last `tokens` columns cannot be exact."""
    length = layer.columns_seen - tokens
    if length < 0:
        raise CacheError(
            f"crop(-{tokens}) on a cache of {layer.columns_seen} tokens: crop at most that many."
        )
    if tokens == 0 or length == 0 or layer.store is None:
        return
    if length < layer.evicted_at:
        raise CacheError(
            f"crop(-{tokens}) would go back to {length} tokens, but layer {layer.kind.index}"
            f" evicted tokens at {layer.evicted_at}, and they are gone. Crop less, call"
            " activate_past_recording() before the tokens are fed, or use a policy and a model"
            " that evict nothing after that."
        )
    if length < layer.padded_at:
        raise CacheError(
            f"crop(-{tokens}) would go back to {length} columns, behind the last padded column "
            f"({layer.padded_at}). Crop less, or run the sequences without padding."
        )
    if length < layer.prompted_at and layer.limits is not None and layer.limits.interval > 1:
        raise CacheError(
            f"crop(-{tokens}) would go back to {length} tokens, behind the end of the last"
            f" prompt chunk ({layer.prompted_at}), where the interval of {layer.recipe} began"
            " again. Crop less, or use interval=1."
        )
    if layer.recalled and tokens > layer.sequences.drafts.tokens:
        raise CacheError(
            f"crop(-{tokens}): the policy {layer.recipe} scores by the last queries, and those"
            " before the cropped tokens are gone. Call activate_past_recording() before the"
            " tokens are fed, or use a policy that evicts after prompts only."
        )
    if layer.recipe.gathers and tokens > layer.sequences.drafts.tokens:
        raise CacheError(
            f"crop(-{tokens}): the policy {layer.recipe} accumulated attention of the cropped"
            " tokens, which cannot be taken back. Call activate_past_recording() before they"
            " are fed, or use a policy without accumulated scores."
        )


@lasting
def crop(layer: Layer, tokens: int) -> None:
    """Forgets the last `tokens` columns. Raises CacheError where that cannot be exact."""
    check_crop(layer, tokens)
    if tokens == 0 or layer.store is None:
        return
    if tokens == layer.columns_seen:
        layer.reset()
        return
    layer.note_peak()  # what drafts attended to goes with them
    layer.columns_seen -= tokens
    own = layer.sequences
    own.seen_B = own.seen_B - tokens
    own.looked_B = own.looked_B.minimum(own.seen_B)
    with layer.rows.memory.lock:  # since then nothing was evicted: the tokens are the last slots
        layer.rows.truncate(tokens)
    layer.excess.forget()
    final = tokens - own.drafts.take_back(tokens)  # drafted tokens are not watched, nor counted
    own.watched.take_back(final)
    own.earlier.clear()  # it may be the query of a token that is gone
    own.decoded.take_back(final)
