"""When slots become old, and how they are then stored: the format stage of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from kvpress import host, ops
from kvpress.errors import PolicyError
from kvpress.formulas.boost import sensitive
from kvpress.formulas.page_layout import PageLayout
from kvpress.pipe.state.layer import Layer
from kvpress.pipe.state.measures import layouts
from kvpress.pipe.state.tokens import Tokens
from kvpress.policy.formats import SHORT, Packing, Window, format_of, guards, page_slots
from kvpress.store import Aging
from kvpress.store.base import KEY, POSITION, VALUE
from kvpress.store.division import pages_of
from kvpress.store.packing import finite, pack

_PROMPT = 32  # tokens; fewer, as of a turn or a chunk, leave no page that is not full
_NOTHING: Mapping[int, int] = MappingProxyType({})


def watch(layer: Layer, group: Sequence[int], tokens: Tokens) -> None:
    """Keeps the last queries of sequences of which no slot is old yet.

    Those of which enough others will follow before any slot becomes old are not: short texts hold
    none. After a prompt slots may be old at once. Drafted tokens are not watched, so that nobody
    can tell how many will follow.
    """
    aging = layer.rows.aging
    if aging is None or layer.recipe.watched == 0:
        return
    layer.logits = (tokens.scaling, tokens.softcap)
    new = tokens.query_bNQD.shape[2]
    for i, b in enumerate(group):
        if aging.decided_B[b]:
            continue
        follow = 0 if new >= max(_PROMPT, layer.recipe.watched) else _follow(layer, aging, b, new)
        if follow >= layer.recipe.watched:
            layer.sequences.watched.pop(b, None)
            continue
        query_NQD = tokens.query_bNQD[i].detach()
        before = layer.sequences.watched.get(b)
        joined = query_NQD if before is None else torch.cat([before, query_NQD], dim=1)
        layer.sequences.watched[b] = joined[:, follow - layer.recipe.watched :].clone()


def _first(layer: Layer) -> Tensor:
    """Tokens that come to sequences before it is decided how they are stored: int64 `[B]`.

    Unless they end a prompt: so short a text would hold more queries that decide than tokens.
    """
    least = layer.recipe.residual + page_slots(layer.recipe.packing)
    return (least - layer.sequences.seen_B).clamp_min(0)


def _follow(layer: Layer, aging: Aging, b: int, new: int = 0) -> int:
    """At least so many tokens come to a sequence before it is decided how it is stored.

    new: tokens that were counted as seen, but are not stored yet.
    """
    if layer.context.recording.on:
        return 0
    return max(0, aging.before_old(b) - new, int(_first(layer)[b]))


def pack_due(layer: Layer, read: Mapping[int, int] = _NOTHING) -> None:
    """Packs what has become old. How a sequence is packed is decided the first time.

    read: sequences that have read a prompt, and how many tokens of it. A page may then be begun
    that it does not fill, where all queries are known that decide how it is stored.
    """
    aging = layer.rows.aging
    if aging is None:
        return
    most = layer.recipe.watched
    ended = [
        b
        for b, new in read.items()
        if new >= _PROMPT and (aging.decided_B[b] or _watched(layer, b) >= most)
    ]
    due = aging.due(_first(layer), ended) if ended or aging.room <= 0 else []
    if due:
        _pack(layer, aging, due, ended)
    for b in read.keys() & layer.sequences.watched.keys():
        _forget(layer, aging, b)


def _forget(layer: Layer, aging: Aging, b: int) -> None:
    """Forgets queries that others will follow: after a prompt rows may hold few tokens of it."""
    query_NQD, most = layer.sequences.watched.pop(b), layer.recipe.watched
    left = min(query_NQD.shape[1], most - _follow(layer, aging, b))
    if left > 0:
        layer.sequences.watched[b] = query_NQD[:, -left:].clone()


@torch.no_grad()
def _pack(layer: Layer, aging: Aging, due: Sequence[int], ended: Sequence[int]) -> None:
    with layer.timed("format"):
        ready = []
        for b in due:
            # Tokens that were taken back may have been all that was watched: then the next decides.
            if not aging.decided_B[b] and (not layer.recipe.watched or _watched(layer, b)):
                _decide(layer, aging, b, b in ended)
            if aging.decided_B[b]:
                ready.append(b)
        if ready:
            memory = aging.recent.memory
            before = memory.nbytes
            aging.pack_old(ready, ended)
            layer.note_peak(before - memory.nbytes)  # for a moment both forms are there


def _watched(layer: Layer, b: int) -> int:
    """Queries of a sequence that are kept."""
    query_NQD = layer.sequences.watched.get(b)
    return 0 if query_NQD is None else query_NQD.shape[1]


def _decide(layer: Layer, aging: Aging, b: int, ended: bool) -> None:
    """Chooses the channels of a sequence, and the format of each of its rows."""
    window = _window(layer, aging, b)
    chosen = layer.recipe.stage("prune").prune(window)
    heads, device = layer.kind.heads, layer.rows.device
    key, value = (
        _checked(layer, channels, heads, width, device)
        for channels, width in zip(chosen, (layer.key_width, layer.value_width), strict=True)
    )
    packing = layer.recipe.packing
    if packing is not None and packing.boosted(key.shape[2]):
        key = torch.cat([key, _boosted(window, packing)], dim=2)
    kept = (key.shape[2], value.shape[2])
    ours = layouts(layer, kept)
    if aging.kept not in (None, kept):
        raise PolicyError(
            f"{layer.recipe} keeps {kept} channels of keys and values in layer {layer.kind.index},"
            f" but kept {aging.kept} before. It must keep as many in every sequence."
        )
    short_H, wide_H = _short(layer, b), host.zeros(heads, dtype=torch.bool)
    format_H = format_of(packing, wide_H, short_H)
    if guards(packing):
        taken_H = aging.to_pack(b, format_H, ended)
        wide_H = _guard(layer, window, [ours[n] for n in format_H], taken_H, (key, value))
        format_H = format_of(packing, wide_H, short_H)
    aging.decide([b], ours, key, value, format_H[None])
    layer.sequences.watched.pop(b, None)
    _explain(layer, ours[0])


def _boosted(window: Window, packing: Packing) -> Tensor:
    """The key channels of each row that have two codes: int64 `[1, H, C]`."""
    count = packing.boosted(window.key_BHSD.shape[3])
    shown = (window.query_BNQD, window.key_BHSD, window.held_BHS)
    return sensitive(*shown, packing.key_group, packing.key_bits, count)


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


def _short(layer: Layer, b: int) -> Tensor:
    """Rows of a sequence that have small pages, by what they may come to hold: bool, host."""
    if not layer.stores.has_short_rows:
        return host.zeros(layer.kind.heads, dtype=torch.bool)
    return layer.rows.counts_BH[b].maximum(layer.sequences.quota_BH[b]) < SHORT


def _guard(
    layer: Layer,
    window: Window,
    layout_H: Sequence[PageLayout],
    packed_H: Tensor,
    channels: tuple[Tensor, Tensor],
) -> Tensor:
    """Rows whose attention output the packed slots would move too far: bool `[H]`, on the host.

    packed_H: so many of their first slots are to be packed.
    """
    packing = layer.recipe.packing
    assert packing is not None and packing.bound is not None, "only a guard has two layouts"
    exact = (window.key_BHSD[0], window.value_BHSE[0])
    moved = (exact[0].clone(), exact[1].clone())
    first_H, device = (~window.held_BHS[0]).sum(-1).cpu(), exact[0].device
    packed_H = packed_H * finite(*exact)
    for layout in sorted(set(layout_H)):
        mine_H = host.tensor([own == layout for own in layout_H])
        pages = pages_of(first_H, packed_H * mine_H, layout.slots)
        row_A = pages.row_A.to(device)
        at, of_pages = (row_A[:, None], pages.slot_AS.to(device)), []
        for kept_1HC in channels:
            of_pages.append(kept_1HC[0, row_A].to(torch.int16))
        packed_AX = pack(layout, exact[0][at], exact[1][at], (of_pages[0], of_pages[1]))
        rough = ops.unpack(packed_AX, *of_pages, list(layout), exact[0].new_empty(0))
        for x, own in zip(moved, rough, strict=True):
            x[at] = own  # slots that fill a page are the last one once more, with its numbers
    return (window.errors(moved[0][None], moved[1][None]) > packing.bound).cpu()[0]


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
        parts.append(f"{name} {min(kept, width)} of {width} channels {stored}")
        if kept > width:
            parts[-1] += f", {kept - width} of them in {2 * bits}"
    layer.context.ledger.note(f"Old slots: {', '.join(parts)}.")
