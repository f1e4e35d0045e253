"""What policies cannot do on layers of some kinds, refused when an engine is attached."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress.errors import PolicyError
from kvpress.formulas.hadamard import LEAST, block
from kvpress.hf.sinks import check_sinks
from kvpress.pipe.state.channels import turns
from kvpress.policy.formats import Packing
from kvpress.policy.recipe import Recipe
from kvpress.types import MOST_CODED, LayerKind


def check_fit(recipe: Recipe, kinds: Sequence[LayerKind]) -> None:
    """Raises PolicyError where a policy and the layers of a model do not go together."""
    _check_slopes(recipe, any(kind.slopes for kind in kinds))
    check_sinks(recipe, any(kind.sink for kind in kinds))
    _check_wide(recipe, kinds)
    _check_turns(recipe, kinds)
    _check_readers(recipe, any(kind.readers for kind in kinds))


def _check_wide(recipe: Recipe, kinds: Sequence[LayerKind]) -> None:
    """Raises PolicyError for old pages of heads that are too wide for the arithmetic of codes."""
    wide = [kind for kind in kinds if kind.window is None and kind.width > MOST_CODED]
    if wide and (recipe.formats or recipe.retrieves):
        raise PolicyError(
            f"{recipe} keeps old keys and values in pages of a format, or judges them by boxes, for"
            f" heads of at most {MOST_CODED} channels; layer {wide[0].index} of this model has"
            f" {wide[0].width}. Use a policy that evicts."
        )
    packing = recipe.packing or Packing()
    for kind in kinds if packing.boost else ():
        more = packing.boosted(kind.width)
        if kind.window is None and not 0 < more <= MOST_CODED - kind.width:
            raise PolicyError(
                f"{recipe}: boost={packing.boost:g} gives {more} of the {kind.width} key channels"
                f" of layer {kind.index} two codes; it can be 1 to {MOST_CODED - kind.width} (heads"
                f" of fewer than {MOST_CODED}). Give another share, or leave boost out."
            )


def _check_turns(recipe: Recipe, kinds: Sequence[LayerKind]) -> None:
    """Raises PolicyError for heads whose channels cannot be turned."""
    what = turns(recipe)
    for kind in kinds if what != "none" else ():
        if kind.window is None and (kind.latent or block(kind.width) < LEAST):
            raise PolicyError(
                f"{recipe}: rotate={what} turns channels in blocks of a power of two, at least"
                f" {LEAST}, of keys and values that are stored apart; those of layer {kind.index}"
                f" have {kind.width} channels{' of a latent' if kind.latent else ''}. Leave rotate"
                " out."
            )


def _check_readers(recipe: Recipe, readers: bool) -> None:
    """Raises PolicyError for what only layers can do that nobody else reads."""
    if recipe.retrieves and readers:
        raise PolicyError(
            f"{recipe} reads some pages of a layer, but layers of this model share their keys and"
            " values, and those that read them would read all. Use a policy that evicts or packs."
        )


def _check_slopes(recipe: Recipe, slopes: bool) -> None:
    """Raises PolicyError for what cannot be where positions are in channels (ALiBi)."""
    if "query" in recipe.needs and slopes:
        raise PolicyError(
            f"{recipe} scores by queries, which on this model carry ALiBi positions in channels"
            " of their own. Use a policy that does not."
        )
    if (recipe.formats or recipe.retrieves) and slopes:
        raise PolicyError(
            f"{recipe}: keys of this model carry ALiBi positions in channels, which must not be"
            " pruned, quantised or judged by boxes. Use a policy that keeps keys as they are,"
            " and reads them all."
        )
