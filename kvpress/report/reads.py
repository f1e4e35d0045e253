"""What a report says of decode steps that read some of the stored pages only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvpress.report.tables import size


@dataclass(frozen=True, kw_only=True)
class ReadFigures:
    """The decode steps of a layer since its cache was made, or loaded.

    steps: of all rows together. tokens_read, tokens_held: of a row, on average. bytes_read: of all
    steps, with the boxes that were looked at. boxes: of a row, on average. missed_mean, missed_max:
    the share of its attention that a query head may have missed at the most, on average and of any;
    None where the policy left out tokens on purpose (`top`). short: steps of rows that read all
    they may and may have missed more than was asked. turned: steps of rows whose pages were chosen
    anew. unsure: steps of rows that chose by boxes, since a retrieval head was not sure. Of pages
    that may be elsewhere than on the device, see `store.moves`: adjacent, again: that steps chose
    which followed one of the same rows, and of these that one too; missing, ahead: not on the
    device when they were chosen, but for loads that had begun before, and of these there or on
    their way by such loads; vain: of such loads, that were not chosen or did not come.
    """

    steps: int
    tokens_read: float
    tokens_held: float
    bytes_read: int
    boxes: float
    missed_mean: float | None
    missed_max: float | None
    short: int
    turned: int
    unsure: int = 0
    adjacent: int = 0
    again: int = 0
    missing: int = 0
    ahead: int = 0
    vain: int = 0


def remark(layers: Sequence[ReadFigures]) -> str:
    """One sentence of all layers that read so."""
    return " ".join(_parts(layers))


def _parts(layers: Sequence[ReadFigures]) -> Iterator[str]:
    steps = sum(x.steps for x in layers)
    read, held, boxes = (
        sum(getattr(x, name) * x.steps for x in layers) / max(1, steps)
        for name in ("tokens_read", "tokens_held", "boxes")
    )
    per = sum(x.bytes_read for x in layers) / max(1, steps)
    yield (
        f"Decode steps of {len(layers)} layers read {read:,.0f} of {held:,.0f} tokens a row"
        f" ({read / max(1.0, held):.0%}), {size(round(per))} with {boxes:,.0f} boxes."
    )
    worst = [x.missed_max for x in layers if x.missed_max is not None]
    if worst:
        mean = sum((x.missed_mean or 0.0) * x.steps for x in layers) / max(1, steps)
        yield (
            "An upper limit of the attention that a query head missed, mostly far above what it"
            f" did: {mean:.1%} on average, {max(worst):.1%} at any step."
        )
    if short := sum(x.short for x in layers):
        yield f"{short:,} rows of {steps:,} read all they may and may have missed more than `mass`."
    if turned := sum(x.turned for x in layers):
        yield f"{turned:,} rows of {steps:,} chose their pages anew, since their queries turned."
    if unsure := sum(x.unsure for x in layers):
        yield f"{unsure:,} rows of {steps:,} chose by boxes: the retrieval head was not sure."
    adjacent, again, missing, ahead, vain = (
        sum(getattr(x, name) for x in layers)
        for name in ("adjacent", "again", "missing", "ahead", "vain")
    )
    if adjacent:
        yield f"Of the pages that a step chose the one before had chosen {again / adjacent:.1%}."
    if ahead or vain:
        yield (
            f"Of {missing:,} pages that were missing {ahead:,} were there or on their way when"
            f" they were chosen; {vain:,} were loaded ahead in vain."
        )
