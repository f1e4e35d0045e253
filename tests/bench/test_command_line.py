"""What every command shows: its defaults and an example, and tables that lose nothing."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from kvpress.bench.calibrate.commands import heads_table
from kvpress.bench.common.report import Sheet, table
from kvpress.bench.gpu import compile as ahead
from kvpress.bench.gpu.measure import app as gpu_app
from kvpress.bench.quality import standard_table
from kvpress.bench.quality import table as quality_table
from kvpress.bench.quality.results import Cell
from kvpress.bench.quality.tasks import LM_EVAL
from kvpress.bench.sparse import commands as sparse
from kvpress.bench.sparse.measure import Row
from kvpress.bench.speed import benches
from rich.console import Console
from typer.testing import CliRunner

from kvpress import cli
from kvpress.cli import app

torch = pytest.importorskip("torch")
LONG = "keyformer:budget=0.5,sink=4,recent_ratio=0.25+think:keep=0.6+quant:bits=4"


def leaves(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Every command below one, by its whole name."""
    children = getattr(node, "commands", None)
    if not children:
        yield name, node
    for child, found in (children or {}).items():
        yield from leaves(f"{name} {child}", found)


ROOT: Any = typer.main.get_command(app)
COMMANDS = dict(leaves("kvpress", ROOT))
COMMANDS["scripts/gpu"] = typer.main.get_command(gpu_app)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_help_ends_with_an_example_that_can_be_read(name: str) -> None:
    said = COMMANDS[name].epilog or ""
    words = shlex.split(said.removeprefix("Example: "))
    assert said.startswith("Example: ") and " ".join(words).startswith(name)
    COMMANDS[name].make_context(name, words[len(name.split()) :])  # raises where it is wrong


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_help_says_what_an_option_is_and_what_holds_without_it(name: str) -> None:
    for option in COMMANDS[name].params:
        if option.param_type_name != "option" or option.name == "help":
            continue
        assert option.help, option.name
        if option.default in (None, [], ()):
            assert isinstance(option.show_default, str), option.name
        assert option.show_default, option.name


def test_help_shows_them_at_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in ("60", "80"):
        monkeypatch.setenv("COLUMNS", width)
        text = CliRunner().invoke(app, ["bench", "decode", "--help"]).output
        flat = re.sub(r"[\s│]+", " ", text)
        for said in (
            "[default: (8000, of one layer 32768)]",
            "[default: (a GPU if there is one)]",
            "Example: kvpress",
        ):
            assert said in flat, text


# ---- tables


def speed_rows() -> list[dict[str, Any]]:
    numbers = {"median": 0.123, "low": 0.1, "high": 0.2, "p95": 0.19}
    return [
        {
            "bench": "decode",
            "tokens": 8000,
            "batch": 8,
            "candidate": name,
            "error": None,
            "seconds": numbers,
            "attention": numbers,
            "tokens_per_second": 1234.5,
            "bytes_held": 123 << 20,
            "bytes_weights": 500 << 20,
            "quality": [{"task": "copy", "score": 0.9, "low": 0.85, "high": 0.95}],
        }
        for name in ("transformers", "full", LONG)
    ]


def quality_cells(metric: Any) -> list[Cell]:
    ours = {"exact": 1.0, "tokens": 1.0, "nll": 0.5, "kl": 0.1, "agreement": 0.9}
    other = {"task": "gsm8k", "label": "exact_match, strict", "value": 0.5, "error": 0.01}
    scores = [{**ours, **other, "documents": 1319}]
    return [
        Cell("gsm8k", 2048, 0, "hidden", name, scores, None, 51, 100, metric=metric)
        for name in ("full", LONG)
    ]


def sheets() -> dict[str, Sheet]:
    (speed,) = benches.sheets_of(speed_rows())
    (quality,) = quality_table.sheets(quality_cells("exact"))
    standard = standard_table.sheet(quality_cells(LM_EVAL))
    assert standard is not None
    odd = Sheet("a [title]", ("name", "value"), (("[x]", "1"),), ("failed: [B, N] is no [tag]",))
    return {"speed": speed, "quality": quality, "lm-eval": standard, "odd": odd}


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", ["speed", "quality", "lm-eval", "odd"])
def test_sheets_fold_and_lose_nothing(name: str, width: int) -> None:
    sheet = sheets()[name]
    text = printed(table(sheet), width)
    for line in (sheet.head, *sheet.lines):
        for entry in line[sheet.labels :]:
            assert entry in text, text
        for entry in line[: sheet.labels]:
            assert all(piece in text for piece in re.findall(r"[\w=\[\]]{1,9}", entry)[:3]), text
    flat = " ".join(text.split())
    assert sheet.title in flat and all(note in flat for note in sheet.notes)


@pytest.mark.parametrize("width", [60, 80])
def test_other_tables_fold_and_lose_nothing(width: int) -> None:
    row = Row(0, 16000, [1.234], [0.1], [0.5], 0.25, 0.01, 8)
    text = printed(sparse.table([row]), width)
    for said in ("16,000", "1.23", "2.06×", "25.0%", "1.00%", "speed-up", "density", "error"):
        assert said in text, text
    text = printed(heads_table(torch.tensor([[0.064, 0.0]])), width)
    assert "dense" in text and "0.064" in text and "heads" in text
    console = Console(file=io.StringIO(), width=width, color_system=None)
    made = ahead.Compiled("decode_step.step_kernel", "sm_100", "bf16 D=128", 4, 3, 91, 0, 512, 0.31)
    ahead.show([made], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for said in ("sm_100", "registers", "91", "spills", "0.5 KiB", "occupancy", "31%"):
        assert said in text, text


@pytest.mark.parametrize("width", ["60", "80"])
def test_lists_of_the_command_line_fold(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(cli.console, "_width", None)  # where it was made, columns were others
    for command, words in (
        ("policies", ["policy", "what it does", "options", "keyformer", "budget="]),
        ("info", ["versions", "torch", "devices", "operators", "KVPRESS_CACHE"]),
    ):
        text = CliRunner().invoke(app, [command]).output
        assert all(word in text for word in words) and "…" not in text.replace("=…", "")
        assert max(map(len, text.splitlines())) <= int(width)


def test_all_tables_have_one_style() -> None:
    """Heads are underlined, nothing else has a line."""
    for sheet in sheets().values():
        lines = printed(table(sheet), 200).splitlines()
        assert sum("─" in line for line in lines) == 1 and not re.search("[│┃━]", "".join(lines))


def printed(what: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines()), text
    return text
