"""What caches of transformers can do and engine caches cannot: methods that say so."""

from __future__ import annotations

from typing import Any, NoReturn

from kvpress.errors import CacheError


def refuse_tensors(cache: Any, *given: Any) -> NoReturn:
    """Refused: rows are of different lengths and lie in pages."""
    raise CacheError(
        "An engine cache has no keys and values by layer: what it keeps lies in pages, row by row."
        " Ask it with kept_positions(layer, sequence, head), report() or get_seq_length()."
    )


def refuse_pickling(cache: Any, protocol: Any) -> NoReturn:
    """Refused: an engine is not in the file."""
    raise CacheError(
        "A compressed cache cannot be pickled (pickle, torch.save, another process): it belongs"
        " to an engine on a model. Use cache.save(path), and engine.load_cache(path) where it"
        " is to go on; copy.deepcopy(cache) and cache.fork() copy it."
    )


def refuse_offloading(layer: Any) -> NoReturn:
    """Refused: tiers are the store's own business."""
    raise CacheError("This cache cannot be offloaded by transformers. Do not pass offloading=True.")
