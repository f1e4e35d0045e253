"""Figures of several panels, and the error where they cannot be drawn."""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

from kvpress.errors import KVPressError

_COLUMNS = 2
_PANEL = (5.0, 3.2)  # inches


class PlotError(KVPressError):
    """A picture that cannot be drawn."""


def require() -> None:
    """Raises PlotError where matplotlib is not installed: before a long run, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError(
            "A plot needs matplotlib, which is not installed. Run: pip install matplotlib, or do"
            " without: leave out --plot, or make a report as .md."
        )


def figure_of(panels: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels, and their axes. Raises PlotError without matplotlib."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, panels)
    rows = -(-panels // columns)
    size = (_PANEL[0] * columns, _PANEL[1] * rows + 0.6)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes


def add_legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """The one legend of a figure, above its panels."""
    columns = 2 * max(1, round(figure.get_figwidth() / _PANEL[0]))
    place = {"loc": "outside upper left", "ncols": columns}
    figure.legend(handles, labels, fontsize=8, frameon=False, **place)


def picture(figure: Any, kind: str) -> bytes:
    """A figure as png, svg or pdf: the same bytes for the same figure, without a date."""
    import matplotlib

    dates: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    made = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "kvpress"}):
        figure.savefig(made, format=kind, metadata=dates.get(kind))
    return made.getvalue()


def inline_svg(figure: Any, label: str) -> str:
    """A figure inside a page: no ground, and what was black in the page's own colour."""
    figure.patch.set_alpha(0)
    for axis in figure.axes:
        axis.patch.set_alpha(0)
    whole = picture(figure, "svg").decode()
    text = whole[whole.index("<svg") :].replace("#000000", "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
