"""A small writer of SVG: the same bytes each time, legible on light and on dark pages."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# class -> (on a light page, on a dark page); each has a contrast of 3 to 1 or more
INKS = {
    "ink": ("#1f2328", "#f0f6fc"),
    "soft": ("#59636e", "#9198a1"),
    "c0": ("#0969da", "#58a6ff"),
    "c1": ("#bc4c00", "#f0883e"),
    "c2": ("#1a7f37", "#3fb950"),
    "c3": ("#8250df", "#bc8cff"),
    "c4": ("#bf3989", "#f778ba"),
    "c5": ("#9a6700", "#d29922"),
    "c6": ("#0f766e", "#2dd4bf"),
    "c7": ("#6e7781", "#8b949e"),
}
PAGE = ("#ffffff", "#0d1117")
_FILLS = {"page": PAGE, "card": ("#eef1f4", "#1b222b"), "ghost": ("#d1d9e0", "#30363d")}
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


class Svg:
    """A picture that grows by shapes. Lengths are in pixels, from the top left corner."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self._size, self._title, self._description = (width, height), title, description
        self._parts: list[str] = []
        self.rect(0, 0, width, height, "page", round_=8)

    def rect(
        self, x: float, y: float, width: float, height: float, ink: str, round_: float = 0
    ) -> None:
        """A filled rectangle."""
        corner = f' rx="{_number(round_)}"' if round_ else ""
        size = f'width="{_number(width)}" height="{_number(height)}"'
        self._parts.append(
            f'<rect x="{_number(x)}" y="{_number(y)}" {size}{corner} class="{ink}"/>'
        )

    def text(
        self, x: float, y: float, text: str, ink: str = "ink", size: int = 13, anchor: str = "start"
    ) -> None:
        """A line of text on its baseline. anchor: start, middle or end."""
        place = f'x="{_number(x)}" y="{_number(y)}" font-size="{size}" text-anchor="{anchor}"'
        self._parts.append(f'<text {place} class="{ink}">{html.escape(text)}</text>')

    def line(
        self, points: Sequence[tuple[float, float]], ink: str, width: float = 1, dash: str = ""
    ) -> None:
        """A line through points. dash: lengths of strokes and gaps, such as "4 3"."""
        through = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        style = f'stroke-width="{_number(width)}"{dashes}'
        self._parts.append(f'<polyline points="{through}" {style} class="line s-{ink}"/>')

    def mark(self, x: float, y: float, shape: int, ink: str, size: float = 4) -> None:
        """A circle, square, diamond or triangle."""
        if shape % 4 == 0:
            place = f'cx="{_number(x)}" cy="{_number(y)}" r="{_number(size)}"'
            self._parts.append(f'<circle {place} class="{ink}"/>')
            return
        corners = {
            1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            2: ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
            3: ((0, -1.2), (1.2, 1), (-1.2, 1)),
        }[shape % 4]
        points = " ".join(f"{_number(x + a * size)},{_number(y + b * size)}" for a, b in corners)
        self._parts.append(f'<polygon points="{points}" class="{ink}"/>')

    def runs(
        self, x: float, y: float, spans: Iterable[tuple[float, float]], height: float, ink: str
    ) -> None:
        """Filled spans (start, length) along a row, as one shape."""
        box = f"v{_number(height)}"
        path = "".join(
            f"M{_number(x + a)} {_number(y)}h{_number(n)}{box}h-{_number(n)}z" for a, n in spans
        )
        self._parts.append(f'<path d="{path}" class="{ink}"/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, ink: str = "soft") -> None:
        """A straight arrow, along an axis."""
        self.line([(x, y), (to_x, to_y)], ink, 1.5)
        dx, dy = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
        back = [(to_x - 6 * dx - 4 * dy, to_y - 6 * dy - 4 * dx), (to_x, to_y)]
        back.append((to_x - 6 * dx + 4 * dy, to_y - 6 * dy + 4 * dx))
        self.line(back, ink, 1.5)

    def __str__(self) -> str:
        """The whole file."""
        width, height = self._size
        words = f"<title>{html.escape(self._title)}</title>"
        words += f"<desc>{html.escape(self._description)}</desc>"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img" font-family="{_FONT}">'
        )
        return "\n".join([head, words, _style(), *self._parts, "</svg>", ""])


def _style() -> str:
    inks = {**INKS, **_FILLS}
    sides = []
    for side in range(2):
        fills = "".join(f".{name}{{fill:{pair[side]}}}" for name, pair in inks.items())
        sides.append(fills + "".join(f".s-{n}{{stroke:{pair[side]}}}" for n, pair in inks.items()))
    light, dark = sides
    return (
        f"<style>.line{{fill:none;stroke-linejoin:round;stroke-linecap:round}}{light}"
        f"@media (prefers-color-scheme:dark){{{dark}}}</style>"
    )


def _number(value: float) -> str:
    """At most one digit behind the point."""
    return f"{value:.1f}".removesuffix(".0")
