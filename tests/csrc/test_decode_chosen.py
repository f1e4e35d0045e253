"""A step that chooses its pages in one call does what its parts do one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from boxes import BACKENDS, run_of
from chosen import HEADS, LOGITS, ROWS, SLOTS, Step, step_of
from torch import Tensor

from kvpress.errors import OperatorError
from kvpress.ops import Always, Choice, Old, Places, RowPages

CASES = pytest.mark.parametrize(
    ("bits", "candidates", "read"), [(0, 0, 150), (2, 2, 150), (4, 0, 100), (2, 1, 0), (2, 4, 999)]
)


def one_by_one(x: Step, backend: str, bits: int, candidates: int, slots: list[int]) -> list[Tensor]:
    """The same by the operators of the parts."""
    score, choose, cells, attend, missed = (
        run_of(backend, name)
        for name in ("score_pages", "choose_pages", "score_cells", "decode_rows", "missed_mass")
    )
    query_BND, some, layouts, places, numbers, misses = x.query_BN1D[:, :, 0], [], [], [], [], []
    for i, part in enumerate(x.parts):
        box, length, cell, span = x.judged[4 * i : 4 * i + 4]
        rows = RowPages(part.tensors[3], part.tensors[4] // SLOTS)
        keep = (torch.tensor(slots) - x.pages.counts_R).clamp_min(0) // SLOTS
        from_R = (x.seen_B - 50).repeat_interleave(HEADS)
        always = Always(span, torch.full((ROWS,), 4), from_R)
        bound = rank = score(query_BND, box, rows)
        judged = torch.zeros(ROWS, dtype=torch.int64)
        if bits:
            most = keep * candidates if candidates else torch.full_like(keep, 10**6)
            named = Places(*choose(bound, rows, always, most))
            judged = named.chosen_R
            rank, bound = cells(query_BND, box, cell, rows, named, bound, bits, SLOTS)
        read = place, chosen = Places(*choose(rank, rows, always, keep))
        table = part.tensors[3].gather(1, place.long().clamp_min(0))
        none = torch.empty(0, dtype=torch.int64)
        some += [*part.tensors[:3], table, chosen * SLOTS, *part.tensors[5:7], none]
        layouts += list(part.layout)
        misses.append(missed(query_BND, bound, rows, read, length, LOGITS, SLOTS))
        places.append(place)
        numbers.append((chosen, judged))
    out, lse, _ = attend(x.query_BN1D, x.pages, LOGITS, False, Old(some, layouts))
    mass = torch.stack([m for m, _ in misses] or [torch.full_like(lse[..., 0], -torch.inf)])
    longest = torch.stack([n for _, n in misses] or [torch.zeros(ROWS)]).amax(0)
    found = [torch.stack([pair[i] for pair in numbers]) for i in (0, 1)] if numbers else []
    return [out, lse[..., 0], mass.logsumexp(0), longest, *places[:1], *found]


@BACKENDS
@CASES
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_it_does_what_its_parts_do(
    parts: int, bits: int, candidates: int, read: int, backend: str
) -> None:
    x, slots = step_of(parts, bits), [read, read, read // 2, 2 * read]
    given = run_of(backend, "decode_chosen")(*x.operands(bits, candidates, slots))
    wanted = one_by_one(x, backend, bits, candidates, slots)
    out, lse, mass, longest, place, chosen, judged = given
    torch.testing.assert_close(mass, wanted[2], rtol=1e-6, atol=1e-6)
    for own, other in zip((out, lse, longest), (wanted[0], wanted[1], wanted[3]), strict=True):
        assert torch.equal(own, other)
    assert place.shape[1] == sum(part.tensors[3].shape[1] for part in x.parts)
    assert chosen.shape == judged.shape == (parts, ROWS)
    if parts:
        assert torch.equal(place[:, : wanted[4].shape[1]], wanted[4])
        assert torch.equal(chosen, wanted[5]) and torch.equal(judged, wanted[6])
        assert bits == 0 or read > 900 or bool((chosen <= judged).all())


@BACKENDS
def test_a_step_that_may_read_everything_misses_nothing(backend: str) -> None:
    x = step_of(2, 2)
    given = run_of(backend, "decode_chosen")(*x.operands(2, 4, [10**6] * ROWS))
    attend = run_of(backend, "decode_rows")
    every = attend(x.query_BN1D, x.pages, LOGITS, False, x.operands(2, 4, [])[3])
    torch.testing.assert_close(given[0], every[0], rtol=1e-5, atol=1e-5)
    assert bool((given[2] == -torch.inf).all()) and not bool(given[3].any())


@BACKENDS
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (4, [], r"judged has 0 tensors; 1 parts? have 4 each"),
        (5, torch.tensor([340.0, 280.0]), "seen_B (must be|is torch.float32)"),
        (5, torch.tensor([340, 280, 1]), "seen_B has shape|B is"),
        (6, [1, 2], "slots has 2 numbers"),
        (7, Choice(4, 50, 3, 2), "bits is 3|cell_PY has"),
        (7, Choice(4, 50, 2, -1), "candidates is -1"),
    ],
)
def test_what_does_not_fit_is_refused(place: int, value: Any, message: str, backend: str) -> None:
    given = list(step_of(1, 2).operands(2, 2, [100] * ROWS))
    given[place] = value
    with pytest.raises(OperatorError, match=message):
        run_of(backend, "decode_chosen")(*given)
