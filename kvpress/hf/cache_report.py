"""What a cache says of itself: its ledger, and the positions that it keeps."""

from __future__ import annotations

from collections.abc import Sequence

from kvpress.errors import CacheError
from kvpress.hf.spec import DEFAULT_HORIZON
from kvpress.pipe.state import ledger, tier_ledger
from kvpress.pipe.state.context import Context
from kvpress.pipe.state.ids import SeenIds
from kvpress.pipe.state.layer import Layer
from kvpress.report import Report
from kvpress.report.tiers import notes as notes_of_tiers


def report(
    model: str,
    context: Context,
    horizon: int | None,
    states: Sequence[Layer],
    ids: SeenIds,
    beside: int,
) -> Report:
    """The report of a cache.

    horizon: new tokens that were announced; None: nobody said. beside: bytes of states.
    """
    layers = [ledger.report(state) for state in states]
    context.note_peak()
    notes = list(context.ledger.notes)
    scheduled = [policy for policy in context.recipe.policies if hasattr(policy, "horizon")]
    if horizon is None and any(policy.horizon is None for policy in scheduled):
        notes.append(
            "The number of new tokens was not known: schedules used a horizon of"
            f" {DEFAULT_HORIZON}. Use engine.generate(), engine.new_cache(max_new_tokens=...)"
            " or the policy's option horizon."
        )
    notes += ledger.remarks(states, layers)
    tiers = None
    if context.tiers is not None:
        tiers = tier_ledger.figures(states, context.tiers, context.ledger.prompt_seconds)
        notes += notes_of_tiers(tiers)
    return Report(
        model=model,
        policy=str(context.recipe),
        tokens_seen=states[0].sequences.seen_B.tolist(),
        layers=layers,
        bytes_held=sum(layer.bytes_held for layer in layers),
        bytes_full=sum(layer.bytes_full for layer in layers),
        bytes_shared=sum(layer.bytes_shared for layer in layers),
        bytes_ids=ids.nbytes + (context.outlook.nbytes if context.outlook else 0),
        bytes_states=beside,
        bytes_peak=context.ledger.bytes_peak,
        stages=context.ledger.meter.seconds(),
        notes=notes,
        tiers=tiers,
    )


def kept_positions(states: Sequence[Layer], layer: int, sequence: int, head: int) -> list[int]:
    """The sorted positions that one row holds. Raises CacheError for one that does not exist.

    layer: as the model counts its layers, of which some may have no keys.
    """
    known = {state.kind.index: state for state in states}
    if layer not in known:
        allowed = ", ".join(map(str, known))
        raise CacheError(
            f"layer={layer} does not exist, or has no keys of its own: allowed are {allowed}."
        )
    state = known[layer]
    _check_index(sequence, len(state.sequences), "sequence")
    _check_index(head, state.kind.heads, "head")
    return ledger.kept_positions(state, sequence, head)


def _check_index(given: int, limit: int, name: str) -> None:
    if not 0 <= given < limit:
        raise CacheError(f"{name}={given} does not exist: allowed are 0 to {limit - 1}.")
