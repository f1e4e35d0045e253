"""`kvpress report` and `kvpress plot`: tables first, on every screen, and no date in a picture."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from kvpress.bench.common.figures import inline_svg, picture
from kvpress.bench.common.models import DEMO_NAME
from kvpress.bench.common.page import page
from kvpress.bench.quality import plots, table
from kvpress.bench.quality.report import report
from kvpress.bench.quality.results import Cell, Results
from typer.testing import CliRunner

from kvpress.cli import app

pytest.importorskip("matplotlib")
POLICIES = {
    "full": (1.0, 100),
    "h2o:budget=0.2": (0.4, 20),
    "h2o:budget=0.5": (0.7, 50),
    "snapkv:budget=0.5,window=64": (0.9, 50),
    "no context": (0.1, 0),
}


def results(policies: dict[str, tuple[float, int]] = POLICIES) -> Results:
    """One task; of each policy a score and the bytes that it held, in percent."""
    made = Results({"model": "demo", "text": None}, {"device": "cpu", "cpu": "Some CPU"}, None)
    numbers = {"tokens": 1.0, "nll": 0.5, "kl": 0.1, "agreement": 0.9, "label": ""}
    for name, (score, held) in policies.items():
        for index in range(3):
            scores = [{**numbers, "exact": score}]
            made.add(Cell("facts", 1024, index, "hidden", name, scores, None, held, 100))
    return made


@pytest.fixture(scope="module")
def shown() -> str:
    return page(report(results()))


def test_a_page_is_for_small_screens_and_dark_ones(shown: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in shown
    assert "prefers-color-scheme: dark" in shown and "color-scheme: light dark" in shown
    assert "#000000" not in shown and "currentColor" in shown  # black would not be seen in the dark


def test_tables_come_before_plots_and_the_model_has_its_name(shown: str) -> None:
    assert shown.index("</table>") < shown.index("<svg")
    assert shown.rindex("</table>") < shown.index("<svg")
    assert f"model: {DEMO_NAME} (demo)" in shown


def test_one_legend_above_the_panels_names_every_line(shown: str) -> None:
    (figure,) = report(results()).figures()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "h2o",
        "snapkv:window=64",
        "full",
        "no context",
    ]
    assert [line.get_linestyle() for line in legend.get_lines()[2:]] == ["--", ":"]
    assert not any(axis.get_legend() for axis in figure.axes)
    figure.canvas.draw()
    assert legend.get_window_extent().y0 > figure.axes[0].get_window_extent().y1
    assert shown.count('id="legend_1"') == 1


def test_levels_that_were_not_measured_are_not_named() -> None:
    some = {name: POLICIES[name] for name in ("full", "h2o:budget=0.2")}
    (figure,) = report(results(some)).figures()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["h2o", "full"]


def test_quality_is_drawn_over_the_bytes_of_several_budgets() -> None:
    figure = plots.quality(list(table.blocks(results())))
    lines = [list(map(float, line.get_xdata())) for line in figure.axes[0].lines]
    assert [20.0, 50.0] in lines and [50.0] in lines


def test_pictures_have_no_date_and_are_the_same_each_time(shown: str, tmp_path: Path) -> None:
    def figure() -> Any:
        return plots.quality(list(table.blocks(results())))

    for text in (shown, picture(figure(), "svg").decode()):
        assert "<dc:date>" not in text and not re.search(r"20\d\d-\d\d-\d\d", text)
    assert picture(figure(), "svg") == picture(figure(), "svg")
    assert b"CreationDate" not in picture(figure(), "pdf")
    assert inline_svg(figure(), "a < b").startswith('<svg role="img" aria-label="a &lt; b"')


def test_the_commands_write_them(tmp_path: Path) -> None:
    source = tmp_path / "quality.jsonl"
    kept = Results({"model": "demo"}, {"device": "cpu"}, source)
    for cell in results():
        kept.add(Cell(**asdict(cell)))
    for command, name in (("report", "a.html"), ("plot", "a.svg"), ("report", "a.md")):
        made = tmp_path / name
        done = CliRunner().invoke(app, [command, str(source), "--out", str(made)])
        assert done.exit_code == 0, done.output
        assert made.stat().st_size > 500 and "<dc:date>" not in made.read_text()
