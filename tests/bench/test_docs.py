"""Generated tables and pictures: up to date, the same each time, legible on any page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from kvpress.bench.docs import svg
from kvpress.bench.docs.__main__ import PICTURES as FOLDER
from kvpress.bench.docs.marks import bodies, fill, filled
from kvpress.bench.docs.pictures import PICTURES

from kvpress.errors import KVPressError

PAGE = "a\n<!-- x: made by scripts/lint -->\nold\n<!-- end of x -->\nb\n"


def test_every_picture_is_of_results() -> None:  # scripts/check says whether it shows them
    assert {path.stem for path in FOLDER.glob("*")} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_same_each_time_and_says_what_it_shows(name: str) -> None:
    text = PICTURES[name]()
    assert text == PICTURES[name]()
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img"
    assert root.findtext(f"{space}title") and root.findtext(f"{space}desc")
    assert not re.search(r"\b20\d\d-\d\d|nan|inf\b", text)  # no date, no missing figure
    classes = {name for found in re.findall(r'class="([^"]+)"', text) for name in found.split()}
    assert all(f".{name}{{" in text for name in classes)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("ink", svg.INKS)
@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_every_ink_can_be_read_on_its_page(ink: str, side: int) -> None:
    bright, dark = sorted((luminance(svg.INKS[ink][side]), luminance(svg.PAGE[side])))[::-1]
    wanted = 4.5 if ink in ("ink", "soft") else 3
    assert (bright + 0.05) / (dark + 0.05) >= wanted


def test_only_what_stands_between_marks_is_replaced(tmp_path: Path) -> None:
    assert bodies(PAGE) == {"x": "old\n"}
    assert filled(PAGE, {"x": lambda: "new"}) == PAGE.replace("old", "new")
    assert filled(PAGE, {"y": lambda: "new"}) == PAGE
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    assert not fill(path, {"x": lambda: "new"}, check=True) and path.read_text() == PAGE
    assert not fill(path, {"x": lambda: "new"}, check=False)
    assert fill(path, {"x": lambda: "new"}, check=True)


@pytest.mark.parametrize("cut", ["<!-- end of x -->\n", "<!-- x: made by scripts/lint -->\n"])
def test_a_mark_without_its_partner_is_refused(cut: str) -> None:
    with pytest.raises(KVPressError, match="generated part"):
        filled(PAGE.replace(cut, ""), {})
