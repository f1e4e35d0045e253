"""What a batcher is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvpress.batching.admission import Admission
from kvpress.batching.desk import Desk, Most
from kvpress.batching.parking import Parking
from kvpress.batching.prefixes import Prefixes
from kvpress.batching.reserving import Reserving
from kvpress.batching.stepper import Pace, Stepper
from kvpress.engine import Engine
from kvpress.errors import InputError, UnsupportedModelError
from kvpress.hf.cache_file import layer_devices
from kvpress.hf.drawing import check_config
from kvpress.hf.planning import shape_of
from kvpress.hf.second_look import positions
from kvpress.store.tiers.caps import Caps

SHARES = ("tenant", "all", "none")
_PREFIX_SHARE = 4  # prefixes take at most so small a part of the cap
_PREFIX_BYTES = 512 << 20  # where there is no cap
_ANY_LENGTH = 2**31 - 1


class Made(NamedTuple):
    """The parts: who takes requests, and who serves them."""

    desk: Desk
    stepper: Stepper


def make(
    engine: Engine,
    pace: Pace | None = None,
    caps: Caps | None = None,
    share: str = "tenant",
    tokenizer: Any = None,
    most_context: int | None = None,
    most_new: int | None = None,
) -> Made:
    """The parts of a batcher of an engine. caps: bytes of keys and values, and where some may wait.

    Raises InputError for options out of range, UnsupportedModelError for what cannot be batched.
    """
    pace = pace or Pace()
    for name, number in pace._asdict().items():
        if name != "patience" and (not isinstance(number, int) or number < 1):
            raise InputError(f"{name}={number!r} must be a whole number of at least 1.")
    if share not in SHARES:
        raise InputError(f"share_prefixes={share!r}. Allowed: {', '.join(SHARES)}.")
    if not engine.spec.ranks.alone:
        raise UnsupportedModelError(
            "This model is held by several processes (tp_size), which would have to agree on every"
            " step; batching does not do that yet. Load it into one process, or use"
            " engine.generate()."
        )
    check_config(engine.model.generation_config)
    spec = engine.spec
    shape = shape_of(engine.model, spec.fingerprint, spec.page_slots, spec.cache_dtype)
    empty = engine.make()
    cap = None if caps is None else caps.device
    parking = Parking(caps, layer_devices(engine.model))
    reserving = Reserving(shape, cap, pace.chunk, bool(empty.beside))
    # A prompt that is compressed behind its end, or that moves states, has no part to share.
    shares = share != "none" and not spec.recipe.defers and not empty.beside
    most = _PREFIX_BYTES if cap is None else cap // _PREFIX_SHARE
    prefixes = Prefixes(pace.chunk, most if shares else 0, reserving)
    context = most_context or positions(engine.model) or _ANY_LENGTH
    limits = Most(context, most_new or context)

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    vocabulary = engine.model.get_input_embeddings().weight.shape[0]
    return Made(
        Desk(engine.recipe, vocabulary, reserving, limits, share, tokenizer is not None),
        Stepper(engine, pace, Admission(reserving, prefixes, parking, pace.patience), text),
    )
