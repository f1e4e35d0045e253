"""Right tokens against bytes held, at the compressions asked for: a line for each policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from kvpress.bench.docs.fewer import Section, curves, sections
from kvpress.bench.docs.svg import Svg
from kvpress.bench.quality.run import BLIND

_WIDTH, _LEFT, _RIGHT, _TOP, _PLOT = 880, 62, 600, 46, 374  # pixels; the last: of the height
_LINE = 20  # pixels from one name to the next
_INKS = 8
_Points = Sequence[tuple[float, float]]


def draw() -> str:
    """The picture of the shortest contexts that are recorded."""
    return str(picture(sections()[0]))


def picture(section: Section) -> Svg:
    """A line per policy that was asked at several ratios, a mark per other one."""
    lines = curves(section)
    height = max(_TOP + _PLOT, _TOP + _LINE * (len(lines) + 1)) + 56
    made = Svg(
        _WIDTH,
        height,
        "Right tokens against bytes held",
        f"{section.title}: tokens right over the tasks that the full cache solves, in % of the"
        " full cache's, over the bytes that the cache holds as a share of a full one in bfloat16."
        " Dashed: a policy of which a combination is drawn too. The figures stand in"
        " docs/quality.md.",
    )
    made.text(_LEFT, 24, "Tokens right, % of the full cache's", size=15)
    shares = [x for points in lines.values() for x, _ in points] or [1.0]
    ends = 2.0 ** math.floor(math.log2(min(shares))), 2.0 ** math.ceil(math.log2(max(shares)))
    ends = ends[0], max(ends[1], 2 * ends[0])
    _axes(made, ends)
    _floor(made, section)
    for number, (name, points) in enumerate(lines.items()):
        dash = "5 4" if _is_alone(name, lines) else ""
        ink = f"c{_number(_base, name, lines) % _INKS}"
        shape = _number(_added, name, lines)
        _curve(made, [_place(ends, *point) for point in points], shape, ink, dash)
        y = _TOP + 8 + _LINE * number
        _curve(made, [(_RIGHT + 24, y), (_RIGHT + 52, y)], shape, ink, dash)
        made.text(_RIGHT + 62, y + 4, name, size=12)
    return made


def _curve(made: Svg, points: _Points, shape: int, ink: str, dash: str) -> None:
    made.line(points, ink, 2, dash)
    for point in points:
        made.mark(*point, shape, ink)


def _number(part: Callable[[str], str], name: str, lines: Mapping[str, _Points]) -> int:
    """The place of a part of a combination among those of all: equal parts look alike."""
    parts = list(dict.fromkeys(map(part, lines)))
    return parts.index(part(name))


def _base(name: str) -> str:
    """What a combination begins with, which gives the ink."""
    return name.partition("+")[0]


def _added(name: str) -> str:
    """What is added to it, which gives the shape."""
    return name.partition("+")[2]


def _is_alone(name: str, lines: Mapping[str, _Points]) -> bool:
    """Whether combinations with this policy are drawn too."""
    return "+" not in name and any(_base(other) == name for other in lines if "+" in other)


def _axes(made: Svg, ends: tuple[float, float]) -> None:
    for score in (0, 20, 40, 60, 80, 100):
        _, y = _place(ends, ends[0], score / 100)
        made.line([(_LEFT, y), (_RIGHT, y)], "ghost")
        made.text(_LEFT - 8, y + 4, str(score), "soft", 12, "end")
    share = ends[0]
    while share <= ends[1]:
        x, _ = _place(ends, share, 0)
        made.text(x, _TOP + _PLOT + 18, f"{100 * share:.3g} %", "soft", 12, "middle")
        share *= 2
    middle = (_LEFT + _RIGHT) / 2
    text = "bytes held, of those of a full cache in bfloat16 (each step twice as many)"
    made.text(middle, _TOP + _PLOT + 38, text, "soft", 12, "middle")


def _floor(made: Svg, section: Section) -> None:
    """The questions alone."""
    for standing in section.group.standings:
        if standing.policy == BLIND and standing.solved is not None:
            _, y = _place((1, 2), 1, standing.solved.mean)
            made.line([(_LEFT, y), (_RIGHT, y)], "soft", 1.5, "2 4")
            made.text(_RIGHT - 4, y - 6, BLIND, "soft", 12, "end")


def _place(ends: tuple[float, float], share: float, score: float) -> tuple[float, float]:
    """Pixels of a share of the bytes, between the ends of the axis, and of a score up to 1.05."""
    low, high = ends
    across = math.log2(share / low) / math.log2(high / low)
    x = _LEFT + across * (_RIGHT - _LEFT)
    return x, _TOP + _PLOT - min(score, 1.05) / 1.05 * _PLOT
