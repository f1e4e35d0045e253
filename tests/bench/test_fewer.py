"""The leading tables and pictures of docs/quality.md: of whatever policies the files hold."""

from __future__ import annotations

import gzip
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path

import pytest
from kvpress.bench.docs import fewer, picture_fewer, picture_heads
from kvpress.bench.docs.record_heads import Budgets
from kvpress.bench.quality.results import FORMAT, Cell
from kvpress.bench.quality.run import BLIND

SETTINGS = {"model": "demo", "dtype": "float32", "cache_dtype": "bfloat16"}
# policy -> ratio, bytes of 1,000, tokens right of the task that full solves
POLICIES = {
    "full": (None, 1020, 1.0),
    "quant": (None, 300, 0.98),
    "h2o:budget=0.25": (4.0, 260, 0.5),
    "h2o:budget=0.125": (8.0, 130, 0.25),
    "h2o:budget=0.25+heads": (4.0, 261, 0.9),
    "h2o:budget=0.125+heads": (8.0, 131, 0.7),
    BLIND: (None, 0, 0.1),
}


def cells(tokens: int, generated: bool) -> list[Cell]:
    made = []
    for policy, (ratio, held, right) in POLICIES.items():
        for task, share in (("copy", right), ("lines", right / 2)):
            answer = {"label": "", "exact": 0.0, "tokens": share, "nll": 1.0, "kl": 0.1}
            answer |= {"agreement": 0.9, **({"generated_tokens": share / 2} if generated else {})}
            known = {"ratio": ratio, "bytes_held": held, "bytes_full": 2000, "bytes_bf16": 1000}
            made += [Cell(task, tokens, i, "hidden", policy, [answer], **known) for i in (0, 1)]
    return made


def write(path: Path, made: list[Cell]) -> None:
    head = {"format": FORMAT, "settings": SETTINGS, "environment": {}}
    text = "".join(json.dumps(line) + "\n" for line in (head, *map(asdict, made)))
    packed = path.suffix == ".gz"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "quality-heads-long.jsonl.gz", cells(4096, True))
    write(tmp_path / "quality-heads.jsonl", cells(1024, False))
    write(tmp_path / "quality-other.jsonl", cells(512, False))
    return tmp_path


def test_a_section_per_length_has_a_line_per_family_and_a_column_per_ratio(folder: Path) -> None:
    short, long = fewer.sections(folder)
    assert [short.group.tokens, long.group.tokens] == [1024, 4096] and short.ratios == [4.0, 8.0]
    assert short.title.endswith("stored in bfloat16") and "SmolLM2" in short.title
    lines = fewer.overview(short, "solved").splitlines()
    assert lines[0] == "|  | 4:1 | 8:1 | as given |"
    assert lines[2] == "| `full` | – | – | 100 [100, 100] at 102.0 % |"
    assert lines[4] == "| `h2o` | 50 [50, 50] at 26.0 % | 25 [25, 25] at 13.0 % | – |"
    assert lines[5] == "| `h2o+heads` | 90 [90, 90] at 26.1 % | 70 [70, 70] at 13.1 % | – |"
    assert lines[6] == f"| {BLIND} | – | – | 10 [10, 10] |"
    by_task = fewer.tasks(short).splitlines()
    assert by_task[0] == "|  | copy | lines |" and len(by_task) == 2 + 5
    assert "| `h2o:budget=0.25+heads` | 90 [90, 90] | 45 [45, 45] |" in by_task


def test_the_page_shows_everything_that_is_recorded_and_nothing_else(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = fewer.page(folder)
    assert "512 tokens" not in text and text.count("The full cache solves copy.") == 2
    assert text.count("Decoded answers") == 1 and text.count("Task by task at 4:1") == 2
    assert fewer.page(tmp_path_factory.mktemp("empty")).startswith("Nothing is recorded yet")


def test_a_combination_is_drawn_in_the_ink_of_its_policy_which_is_dashed(folder: Path) -> None:
    section = fewer.sections(folder)[0]
    assert list(fewer.curves(section)) == ["quant", "h2o", "h2o+heads"]
    text = str(picture_fewer.picture(section))
    ElementTree.fromstring(text)
    assert not re.search(r"nan|inf\b", text)
    drawn = [line for line in re.findall(r"<polyline[^>]*/>", text) if "s-c1" in line]
    assert ['"5 4"' in line for line in drawn] == [True, True, False, False]  # each with its key


def test_the_budget_of_a_head_is_the_height_of_its_bar() -> None:
    found = Budgets("some", 100, 30, 100, [[100, 0], [50, 10]])
    text = str(picture_heads.picture(found))
    root = ElementTree.fromstring(text)
    tall = [
        float(rect.get("height", 0))
        for rect in root.iter("{http://www.w3.org/2000/svg}rect")
        if rect.get("class") == "c0"
    ]
    assert tall == [64, 32, 0, 6.4] and "30 % of the bytes" in text
