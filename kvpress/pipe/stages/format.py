"""When slots become old, and how they are then stored: the format stage of one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.errors import PolicyError
from kvpress.formulas.page_layout import PageLayout
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import layouts
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.formats import Window
from kvpress.store import Aging
from kvpress.store.base import KEY, POSITION, VALUE
from kvpress.store.packing import pack


def watch(layer: Layer, group: Sequence[int], tokens: Tokens) -> None:
    """Keeps the last queries of sequences of which no slot is old yet.

    Those of which enough others will follow before any slot becomes old are not: short texts hold
    none. Drafted tokens are not watched, so that nobody can tell how many will follow.
    """
    aging = layer.rows.aging
    if aging is None or layer.recipe.watched == 0:
        return
    most = layer.recipe.watched
    layer.logits = (tokens.scaling, tokens.softcap)
    new = tokens.query_bNQD.shape[2]
    for i, b in enumerate(group):
        if aging.decided_B[b]:
            continue
        follow = 0 if layer.context.recording.on else max(0, aging.before_old(b) - new)
        if follow >= most:
            layer.sequences.watched.pop(b, None)
            continue
        query_NQD = tokens.query_bNQD[i].detach()
        before = layer.sequences.watched.get(b)
        joined = query_NQD if before is None else torch.cat([before, query_NQD], dim=1)
        layer.sequences.watched[b] = joined[:, follow - most :].clone()


def pack_due(layer: Layer) -> None:
    """Packs what has become old. How a sequence is packed is decided the first time."""
    aging = layer.rows.aging
    if aging is None:
        return
    due = aging.due()
    if due:
        _pack(layer, aging, due)


@torch.no_grad()
def _pack(layer: Layer, aging: Aging, due: Sequence[int]) -> None:
    with layer.timed("format"):
        ready = []
        for b in due:
            # Tokens that were taken back may have been all that was watched: then the next decides.
            if not aging.decided_B[b] and (not layer.recipe.watched or _watched(layer, b)):
                _decide(layer, aging, b)
            if aging.decided_B[b]:
                ready.append(b)
        if ready:
            memory = aging.recent.memory
            before = memory.nbytes
            aging.pack_old(ready)
            layer.note_peak(before - memory.nbytes)  # for a moment both forms are there


def _watched(layer: Layer, b: int) -> int:
    """Queries of a sequence that are kept."""
    query_NQD = layer.sequences.watched.get(b)
    return 0 if query_NQD is None else query_NQD.shape[1]


def _decide(layer: Layer, aging: Aging, b: int) -> None:
    """Chooses the channels of a sequence, and the rows that the guard keeps wide."""
    window = _window(layer, aging, b)
    chosen = layer.recipe.stage("prune").prune(window)
    heads, device = layer.kind.heads, layer.rows.device
    key, value = (
        _checked(layer, channels, heads, width, device)
        for channels, width in zip(chosen, (layer.key_width, layer.value_width), strict=True)
    )
    kept = (key.shape[2], value.shape[2])
    ours = layouts(layer, kept)
    if aging.kept not in (None, kept):
        raise PolicyError(
            f"{layer.recipe} keeps {kept} channels of keys and values in layer {layer.kind.index},"
            f" but kept {aging.kept} before. It must keep as many in every sequence."
        )
    wide_BH = host.zeros(1, heads, dtype=torch.bool)
    if len(ours) > 1:
        wide_BH = _guard(layer, window, ours[0], key, value)
    aging.decide([b], ours, key, value, wide_BH)
    layer.sequences.watched.pop(b, None)
    _explain(layer, ours[0])


def _window(layer: Layer, aging: Aging, b: int) -> Window:
    columns = aging.recent.dense_by_position([b])
    key_BHSD = columns[KEY]
    none = key_BHSD.new_zeros(layer.kind.heads, 0, key_BHSD.shape[3])
    scaling, softcap = layer.logits
    return Window(
        layer=layer.kind.index,
        query_BNQD=layer.sequences.watched.get(b, none)[None],
        key_BHSD=key_BHSD,
        value_BHSE=columns[VALUE],
        position_BHS=columns[POSITION].long(),
        seen_B=layer.sequences.seen_B[[b]],
        scaling=scaling,
        softcap=softcap,
        rotation=layer.rotation,
    )


def _checked(
    layer: Layer, channels: Tensor | None, heads: int, width: int, device: torch.device
) -> Tensor:
    """The channels that a policy chose: int64 `[1, H, C]`. Raises PolicyError."""
    if channels is None:
        return torch.arange(width, device=device).expand(1, heads, width)
    fits = channels.dim() == 3 and channels.shape[:2] == (1, heads) and channels.shape[2] > 0
    if (
        not fits
        or bool((channels.diff(dim=2) <= 0).any())
        or not (int(channels.min()) >= 0 and int(channels.max()) < width)
    ):
        raise PolicyError(
            f"{layer.recipe} chose channels {channels.tolist()} in layer {layer.kind.index}; the"
            f" prune stage returns ascending ones of 0 to {width - 1}, shape [1, {heads}, C]."
        )
    return channels.long()


def _guard(
    layer: Layer, window: Window, layout: PageLayout, key_BHC: Tensor, value_BHU: Tensor
) -> Tensor:
    """Rows whose attention output the packed slots would move too far: bool `[1, H]`, host."""
    packing = layer.recipe.packing
    assert packing is not None and packing.bound is not None, "only a guard has two layouts"
    size, held = layout.slots, window.key_BHSD.shape[2]
    pages = (held - layer.recipe.residual) // size
    rough = []
    for x in (window.key_BHSD, window.value_BHSE):
        rough.append(x[:, :, : pages * size].reshape(-1, size, x.shape[3]))
    channels = [
        c.flatten(0, 1).to(torch.int16).repeat_interleave(pages, 0) for c in (key_BHC, value_BHU)
    ]
    packed_PX = pack(layout, rough[0], rough[1], (channels[0], channels[1]))
    both = ops.unpack(packed_PX, *channels, list(layout), window.key_BHSD.new_empty(0))
    exact = (window.key_BHSD, window.value_BHSE)
    moved = [
        torch.cat([part.view(1, layer.kind.heads, -1, x.shape[3]), x[:, :, pages * size :]], 2)
        for part, x in zip(both, exact, strict=True)
    ]
    return (window.errors(*moved) > packing.bound).cpu()


def _explain(layer: Layer, layout: PageLayout) -> None:
    """A line for the report."""
    sizes = (
        (layout.key_kept, layout.key_width, layout.key_bits),
        (
            layout.value_kept,
            layout.value_width,
            layout.value_bits,
        ),
    )
    parts = []
    for name, (kept, width, bits) in zip(("keys", "values"), sizes, strict=True):
        stored = "as they came" if bits == 16 else f"in {bits} bits"
        parts.append(f"{name} {kept} of {width} channels {stored}")
    layer.context.ledger.note(f"Old slots: {', '.join(parts)}.")
