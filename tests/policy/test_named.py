"""Named recipes: `best:ratio=16` is what was measured to keep most at so many times fewer bytes."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

import kvpress
from kvpress.policy import catalogue, named
from kvpress.policy.loading import PACKAGE, parse, recipes

ROOT = Path(__file__).parents[2]


def test_a_named_recipe_is_what_its_file_says() -> None:
    (entry, *_) = recipes()["best"]
    assert str(parse(f"best:ratio={entry.ratio:g}")) == str(parse(entry.recipe))
    assert str(parse(f"best:ratio={entry.ratio:g}+sale")) == str(parse(entry.recipe + "+sale"))


def test_a_ratio_between_two_gets_the_stronger_one() -> None:
    entries = recipes()["best"]
    assert [e.ratio for e in entries] == sorted({e.ratio for e in entries})
    for weaker, stronger in pairwise(entries):
        between = (weaker.ratio + stronger.ratio) / 2
        assert str(parse(f"best:ratio={between}")) == str(parse(stronger.recipe))


@pytest.mark.parametrize(
    "text", ["best", "best:ratio=0", "best:ratio=1e9", "best:budget=0.5", "best:ratio=x"]
)
def test_others_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(kvpress.PolicyError, match=r"best:ratio=N, at most .*; measured are "):
        parse(text)


def test_every_entry_was_measured_and_holds_what_it_promises() -> None:
    for entries in recipes().values():
        for entry in entries:
            assert 0 < entry.bytes <= 100 / entry.ratio * 1.01
            file = re.search(r"quality-[\w-]+\.jsonl(\.gz)?", entry.measured)
            assert file, entry.measured
            assert (ROOT / "bench" / "results" / file[0]).is_file()


def test_the_list_of_policies_shows_them() -> None:
    shown = catalogue.named()
    assert len(shown) == sum(map(len, recipes().values()))
    assert all(written.startswith("best:ratio=") for written, _, _ in shown)


def test_a_package_without_a_file_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert named.named("bare") == {}


def test_the_file_lies_beside_the_policies() -> None:
    given = json.loads((ROOT / "policies" / named.FILE).read_text(encoding="utf-8"))
    assert set(given) == set(named.named(PACKAGE))
