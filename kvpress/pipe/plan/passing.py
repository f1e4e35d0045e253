"""What a forward pass takes for a while besides the cache, at the most.

Numbers per token and slot are those of the code that they name, rounded up; what is left to chance
(the allocator, libraries that are loaded late) is a share and a sum, both measured.
"""

from __future__ import annotations

from kvpress.pipe.plan.demand import Shape, Texts
from kvpress.pipe.plan.looking import Looking
from kvpress.policy.formats import guards
from kvpress.policy.recipe import Recipe
from kvpress.types import LayerKind

# Of operators and libraries that the first passes load, of threads, and of what was freed and is
# not given back to the system yet (state/heap.py: 32 MiB). All of it was 58 MiB where 8 prompts of
# 1,984 tokens were read 256 at a time: 120 MiB resident besides, of which 62 were tensors.
RUNTIME = 96 << 20
_SLACK = 10  # a tenth more: blocks that an allocator keeps
_DENSE = 4  # copies of a layer's slots: gathered, by position, joined, and a column of a pool
_SCORED = 3  # further ones in float32 where a policy scores keys and values
_PACKED = 4  # further ones where slots are packed: by position, by page, and what is rounded
_PLACES = 40  # bytes by which a slot is found: positions, order, addresses, in 64 bits
_IDS = 64  # bytes of a token before the first layer: ids, mask, places, angles
_LOGITS = 20  # bytes of a word: logits, and what generate() makes of them in float32


def passing_bytes(
    shape: Shape,
    recipe: Recipe,
    texts: Texts,
    chunk: int,
    stored: int,
    tiered: bool = False,
    head: Looking | None = None,
) -> int:
    """The most bytes that a prompt takes while it is read, and a token while it is decoded.

    chunk: tokens of each sequence that are read at once. stored: slots of a row that a chunk finds
    at the most. head: what looks at all tokens before the first layer.
    """
    kinds = {(k.heads, k.queries, k.width, k.window): k for k in shape.kinds}.values()
    layer = max(_layer_bytes(shape, recipe, kind, texts, chunk, stored, tiered) for kind in kinds)
    if head is not None:
        layer = max(layer, head.passing(texts, chunk))
    beside = texts.batch * (_IDS * texts.length + _LOGITS * shape.vocabulary)
    return RUNTIME + (layer + beside) * (_SLACK + 1) // _SLACK


def _layer_bytes(
    shape: Shape,
    recipe: Recipe,
    kind: LayerKind,
    texts: Texts,
    chunk: int,
    stored: int,
    tiered: bool,
) -> int:
    """The same of one layer."""
    tokens, size = texts.batch * chunk, shape.dtype.itemsize
    rows, queries = kind.queries or kind.heads, kind.width
    attending = 4 * shape.hidden + 6 * (rows + 2 * kind.heads) * kind.width
    widest = max(attending, 3 * shape.hidden + 4 * shape.inner)
    activations = tokens * (widest * size + (8 * shape.hidden if size < 4 else 0))
    pair = 2 * kind.heads * kind.width  # numbers of a slot of all heads
    held = min(stored, kind.window or stored)
    slots = texts.batch * (held + chunk)
    copies = _DENSE * size
    # Slots that all stay are attended to in their tiers, span by span.
    streams = tiered and kind.window is None and recipe.limits is None and not recipe.accumulates
    if not held or streams:
        slots, copies = tokens, 2 * size
    found = slots * (pair * copies + kind.heads * _PLACES)
    if recipe.limits is not None and kind.window is None:
        found += slots * pair * 4 * _SCORED + tokens * rows * queries * 4 * _SCORED
    if recipe.formats or tiered or recipe.retrieves:
        found += tokens * pair * size * _PACKED * (1 + guards(recipe.packing))
    if streams:
        found += 3 * tokens * rows * queries * 4  # outputs and their sums, in float32
    return activations + found
