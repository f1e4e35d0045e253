"""Tables lose nothing in a narrow terminal, and reports are tables wherever they are shown."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import helpers
import pytest
from kvpress.bench.run import job as main_job
from rich.console import Console
from rich.table import Table

import kvpress
from kvpress.report import LayerReport, Report
from kvpress.report.tables import Fitted


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which reports have room, whatever the tests run in."""
    monkeypatch.setenv("COLUMNS", "120")


def shown(table: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def layer(
    index: int, kind: str = "full attention", held: int = 1024, slots: int = 8
) -> LayerReport:
    return LayerReport(index, kind, [[slots, slots]], held, 2048)


def report(*layers: LayerReport) -> Report:
    held, full = sum(x.bytes_held for x in layers), sum(x.bytes_full for x in layers)
    return Report("tiny", "some:budget=0.5", [16], list(layers), held, full, {"select": 0.25})


# ---- narrow terminals


@pytest.mark.parametrize("width", [20, 28, 40, 60, 80, 200])
def test_the_table_of_run_has_all_its_numbers_at_every_width(width: int) -> None:
    policy = "keyformer:budget=0.5,sink=4,recent_ratio=0.25"
    whole = replace(report(layer(0)), tokens_seen=[4063])
    result = main_job.Result(policy, ["x"], [4000], 64, 5.35, 17.02, whole)
    text = shown(Fitted(main_job.table([result])), width)
    assert all(len(line) <= width for line in text.splitlines())
    flat = re.sub(r"[^\w.:=,%/]+", "", text)
    for number in ("4,063", "50.0%", "5.35", "17.02", "tok/s", "TTFTs", "share", "held"):
        assert number in flat, text
    assert "…" not in text


@pytest.mark.parametrize("width", [30, 60])
def test_parts_repeat_what_a_line_is_about(width: int) -> None:
    table = Table(title="Title", caption="Caption")
    table.add_column("policy", overflow="fold")
    for n in range(9):
        table.add_column(f"number {n}", justify="right", no_wrap=True)
    table.add_row("first", *(f"1{n}.25" for n in range(9)))
    table.add_row("second", *(f"2{n}.50" for n in range(9)))
    text = shown(Fitted(table), width)
    parts = text.count("first")
    assert parts > 1 and text.count("second") == text.count("policy") == parts
    assert text.count("Title") == text.count("Caption") == 1
    assert all(f"1{n}.25" in text and f"2{n}.50" in text for n in range(9))


def test_a_table_that_has_room_is_as_it_was() -> None:
    table = Table("policy", "what it does")
    table.add_row("full", "keeps everything")
    assert shown(Fitted(table), 80) == shown(table, 80)


# ---- reports


def test_a_report_is_a_table_with_a_line_for_layers_that_are_alike() -> None:
    """Sliding layers between: the layers of one kind are one line, with their bytes together."""
    kinds = ["sliding window" if i % 3 == 2 else "full attention" for i in range(9)]
    made = report(*(layer(i, kind) for i, kind in enumerate(kinds)))
    text = str(made)
    lines = [line for line in text.splitlines() if "attention" in line or "window" in line]
    assert [line.split("  ")[0].strip() for line in lines] == ["0–1, 3–4, 6–7", "2, 5, 8"]
    assert "6.0 KiB" in lines[0] and "3.0 KiB" in lines[1] and "9.0 KiB" in text
    assert "some:budget=0.5 on tiny" in text and "Seconds: select 0.250" in text
    assert repr(made) == text and "LayerReport" not in text


def test_layers_that_differ_have_lines_of_their_own() -> None:
    made = report(layer(0), layer(1, slots=9), layer(2), layer(3, held=1000))
    lines = str(made).splitlines()
    assert sum("attention" in line for line in lines) == 3
    assert any(line.startswith("0, 2 ") for line in lines)


def test_a_notebook_shows_a_table_of_html() -> None:
    made = replace(report(layer(0), layer(1)), notes=["a < b"], policy="<policy>")
    page = made._repr_html_()
    assert page.count("<tr>") == 3 and "<td>0–1</td>" in page
    assert "a &lt; b" in page and "&lt;policy&gt; on tiny" in page and "<policy>" not in page


def test_the_report_of_an_engine_is_short() -> None:
    model = helpers.tiny("llama")
    with kvpress.attach(model, "h2o:budget=0.5") as engine:
        engine.generate(helpers.prompt(1, 40), max_new_tokens=3, do_sample=False)
        made = engine.report()
    assert len(str(made).splitlines()) < 12 and "h2o:budget=0.5" in str(made)
    assert "0–2 " in str(made) and "0–2 " in shown(made, 100)
