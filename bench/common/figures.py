"""Figures of several panels, and the error where they cannot be drawn."""

from __future__ import annotations

import importlib.util
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
