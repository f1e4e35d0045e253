"""The default text is the same everywhere, and every record says from which text it comes."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from each import each, name_of
from kvpress.bench.common import text
from kvpress.bench.common.journal import JournalError, text_of
from kvpress.bench.common.prompt import reference_prompt
from kvpress.bench.quality.results import ResultsError, load
from kvpress.bench.speed.report import report as speed_report
from transformers import AutoTokenizer
from typer.testing import CliRunner

from kvpress.cli import app

KEPT = Path(__file__).parents[2] / "bench" / "results"
RESULTS = sorted([*KEPT.glob("*.jsonl"), *KEPT.glob("*.jsonl.gz")])
DEFAULT = {
    "name": "python-reference-3.11.7",
    "sha256": "71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee",
}


def run(*options: object) -> Any:
    done = CliRunner().invoke(app, [str(option) for option in options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def test_the_default_text_does_not_come_from_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    text.default_text.cache_clear()
    made = text.default_text()
    assert len(made.content) == 465126 and made.to_dict() == DEFAULT
    prompt = reference_prompt(AutoTokenizer.from_pretrained(tiny_model), 500, "Why?")
    assert prompt.startswith('The "assert" statement') and prompt.endswith("Why?")


def test_a_default_text_that_was_changed_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gzip

    (tmp_path / "texts").mkdir()
    file = tmp_path / "texts" / "python-reference-3.11.7.txt.gz"
    monkeypatch.setattr(text, "__file__", str(tmp_path / "text.py"))
    for content in (None, b"no archive", gzip.compress(b"another text")):
        if content is not None:
            file.write_bytes(content)
        text.default_text.cache_clear()
        with pytest.raises(text.TextError, match="Install the package again"):
            text.default_text()
    text.default_text.cache_clear()


@pytest.mark.parametrize("given", ["", "--prompt", "--prompt-file", "--batch-file"])
def test_run_says_of_which_text_the_prompts_are(
    given: str, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Good morning.\nGood night.\n")
    words = {"": [], "--prompt": ["--prompt", "Hello"]}.get(given, [given, file])
    more = ["--prompt-tokens", 100, "--max-new-tokens", 2, "--json", "--device", "cpu"]
    (result,) = json.loads(run("run", "--model", tiny_model, *words, *more).stdout)
    wanted = {"": DEFAULT["sha256"], "--prompt": hashlib.sha256(b"Hello").hexdigest()}
    own = hashlib.sha256(file.read_bytes()).hexdigest()
    assert result["text"]["sha256"] == wanted.get(given, own)
    name = {"": DEFAULT["name"], "--prompt": "--prompt"}.get(given, "mine.txt")
    assert result["text"]["name"] == name


def evaluation(model: Path, out: Path, *more: object) -> Any:
    return run(
        "eval", "--suite", "copy", "--length", 300, "--samples", 1, "--model", model, "--out", out,
        *more,
    )  # fmt: skip


def test_an_evaluation_does_not_go_on_with_another_text(tiny_model: Path, tmp_path: Path) -> None:
    """Nor with a file of the same name that was changed."""
    out, mine = tmp_path / "cells.jsonl", tmp_path / "mine.txt"
    evaluation(tiny_model, out)
    assert load(out).settings["text"] == DEFAULT
    mine.write_text("The rain fell on the hills. " * 40)
    with pytest.raises(ResultsError, match=r"other settings \(text: .*python-ref.*mine\.txt"):
        evaluation(tiny_model, out, "--text", mine)
    out.unlink()
    evaluation(tiny_model, out, "--text", mine)
    mine.write_text("The sun shone on the hills. " * 40)
    with pytest.raises(ResultsError, match="other settings"):
        evaluation(tiny_model, out, "--text", mine)


def test_a_file_of_several_evaluations_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    evaluation(tiny_model, first)
    second.write_text(first.read_text() * 2)
    with pytest.raises(ResultsError, match="holds several runs"):
        run("report", second)


def test_benchmarks_of_several_texts_are_not_set_side_by_side(
    tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--policy", "full", "--rounds", 1, "--warmup", 0, "--device", "cpu", "--out", out]
    command = ["bench", "decode", "--model", tiny_model, *options]
    run(*command, "--tokens", 64)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["settings"]["text"]["sha256"] for row in rows} == {DEFAULT["sha256"]}
    for row in rows:
        row["settings"]["text"] = {"name": "other", "sha256": "0"}
    out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(JournalError, match="several texts"):
        run(*command, "--tokens", 128)
    assert len(out.read_text().splitlines()) == len(rows)
    mixed = [dict(rows[0], tokens=128, settings={}), *rows]
    with pytest.raises(JournalError, match="several texts"):
        speed_report(mixed)


@each(RESULTS, name_of)
def test_recorded_results_name_their_text(path: Path) -> None:
    lines = [json.loads(line) for line in text_of(path).splitlines()]
    for line in lines:
        settings = line.get("settings")
        if settings is not None and not settings.get("files"):
            assert settings["text"] == DEFAULT


def test_results_that_are_kept_are_small() -> None:
    assert [path.name for path in KEPT.iterdir() if path.stat().st_size > 200_000] == []


def test_what_was_compressed_is_still_read(tmp_path: Path) -> None:
    """By its own name, and by the one that it had."""
    packed = next(path for path in RESULTS if path.suffix == ".gz")
    given, known = tmp_path / packed.stem, tmp_path / packed.name
    known.write_bytes(packed.read_bytes())
    assert list(load(given)) == list(load(known)) != []
    shown = [CliRunner().invoke(app, ["report", str(path)]).output for path in (given, known)]
    assert shown[0] == shown[1] and "vs full" in shown[0]
    known.write_bytes(known.read_bytes()[:1000])
    with pytest.raises(ResultsError, match="no results file"):
        load(given)
