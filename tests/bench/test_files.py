"""Tasks from JSON files: where a prompt ends and is cut, what is refused, runs of the command."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress.bench.quality import files, plots, run, table
from kvpress.bench.quality.results import Results, load
from kvpress.bench.quality.sample import Question, Writer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.errors import KVPressError

LONG = "".join(f"<{i}>" for i in range(300)) + "\nQuestion: which?\nAnswer:"


def write(folder: Path, **contents: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def entry(prompt: str = "Sky?\nAnswer:", gold: Any = ("blue",), **more: Any) -> dict[str, Any]:
    return {"origin_prompt": prompt, "gold": gold, **more}


class Listener:
    """A full cache that knows nothing, and notes what it is given. A token is a byte."""

    name = "full"

    def __init__(self, model: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self.writer = Writer(self._tokenizer)
        self.asked: list[tuple[str, str, str]] = []  # context, question, answer

    def read(self, tokens: Sequence[int], calls: Any = (), protect: Any = ()) -> Any:
        return tokens

    def ask(self, cache: Any, question: Question, stepwise: bool) -> torch.Tensor:
        parts = (cache, question.prompt, question.answer)
        self.asked.append(tuple(self._tokenizer.decode(list(part)) for part in parts))
        return torch.zeros(len(question.answer), 256)

    def bytes(self, cache: Any) -> tuple[int, int]:
        return 50, 100

    def step_reads(self, cache: Any) -> None: ...

    def hear(self, folder: Path, length: int | None, positions: int | None = 1024) -> Results:
        """Notes what is asked of each sample, with its prompt and then without."""
        lengths = [] if length is None else [length]
        plans = files.plans(files.read(folder), lengths, None, positions)
        results = Results({}, {}, None)
        run.evaluate(self, [self], self.writer, plans, results)
        return results


@pytest.fixture
def listener(tiny_model: Path) -> Listener:
    return Listener(tiny_model)


# ---- prompts and answers


def test_a_prompt_is_known_but_for_its_last_token_when_it_is_compressed(
    tmp_path: Path, listener: Listener
) -> None:
    results = listener.hear(write(tmp_path, sky={"0": entry()}), 300)
    assert listener.asked == [("Sky?\nAnswer", ":", " blue"), ("", ":", " blue")]
    assert [(c.task, c.tokens, c.protocol, c.policy, c.metric) for c in results] == [
        ("sky", 300, "visible", "full", "tokens"),
        ("sky", 300, "visible", run.BLIND, "tokens"),
    ]


@pytest.mark.parametrize(
    ("prompt", "gold", "answer"),
    [
        ("Answer:", "no", " no"),
        ("Answer:\n", "no", "no"),
        ("Answer: ", "no", "no"),
        ("code:\n", "    return", "    return"),
        ("code:", "\treturn", "\treturn"),
    ],
)
def test_an_answer_is_set_apart_by_one_white_space_at_least(
    prompt: str, gold: str, answer: str, tmp_path: Path, listener: Listener
) -> None:
    listener.hear(write(tmp_path, one={"0": entry(prompt, gold)}), 300)
    context, question, heard = listener.asked[0]
    assert context + question == prompt and heard == answer


@pytest.mark.parametrize(
    "gold", ["blue", ["blue"], ["blue", "grey"], {"all_classes": ["a", "b"], "answers": ["blue"]}]
)
def test_the_first_right_answer_counts_and_earlier_predictions_do_not(
    gold: Any, tmp_path: Path
) -> None:
    before = entry(gold=gold, prediction="wrong", time=3.5, pred=["wrong"])
    write(tmp_path, plain={"0": entry(gold=gold)}, predicted={"0": before})
    read = files.read(tmp_path)
    assert read["plain"] == read["predicted"] == [files.Entry("Sky?\nAnswer:", " blue")]


@pytest.mark.parametrize("limit", [128, 301])
@pytest.mark.parametrize("prefix", [(), (7,)])
def test_a_long_prompt_loses_its_middle_and_nothing_else(
    limit: int, prefix: tuple[int, ...], tmp_path: Path, listener: Listener
) -> None:
    listener.writer.prefix = prefix
    listener.hear(write(tmp_path, long={"0": entry(LONG)}), limit)
    (context, question, answer), (floor, asked, _) = listener.asked
    kept = context[len(prefix) :] + question
    assert len(context + question) == limit and len(floor) == len(prefix)
    half = len(kept) // 2
    assert kept == LONG[:half] + LONG[half - len(kept) :]
    assert question == asked == ":" and answer == " blue"


def test_a_short_prompt_stays_whole_in_the_table_of_the_long_ones(
    tmp_path: Path, listener: Listener
) -> None:
    results = listener.hear(write(tmp_path, mixed={"0": entry(LONG), "1": entry()}), 200)
    assert listener.asked[2][0] == "Sky?\nAnswer"
    (block,) = table.blocks(results)
    assert (block.tokens, block.lines[0].score.samples) == (200, 2)


@pytest.mark.parametrize("length", [None, 256])
def test_a_prompt_and_its_answer_fit_the_model(
    length: int | None, tmp_path: Path, listener: Listener
) -> None:
    results = listener.hear(write(tmp_path, long={"0": entry(LONG, "x" * 99)}), length, 256)
    assert sum(map(len, listener.asked[0])) == 256
    assert {cell.tokens for cell in results} == {256}


def test_an_answer_that_fills_the_model_fails_and_the_others_go_on(
    tmp_path: Path, listener: Listener
) -> None:
    folder = write(tmp_path, some={"0": entry(LONG, "x" * 255), "1": entry()})
    results = listener.hear(folder, None, 256)
    failed, good = ([c for c in results if bool(c.error) is wrong] for wrong in (True, False))
    assert [c.index for c in failed] == [0, 0] and [c.index for c in good] == [1, 1]
    assert "256 tokens leaves no room" in failed[0].error
    assert "no room" in str(next(iter(table.sheets(results))).notes)


def test_lengths_and_samples_are_those_asked_for_and_those_there_are(tmp_path: Path) -> None:
    read = files.read(write(tmp_path, a={"0": entry(), "1": entry()}, b={"0": entry()}), ["b", "a"])
    made = files.plans(read, [300, 200, 300], 5, 1024)
    assert [(p.task.name, p.tokens, p.samples, p.protocol) for p in made] == [
        ("b", 300, 1, "visible"),
        ("b", 200, 1, "visible"),
        ("a", 300, 2, "visible"),
        ("a", 200, 2, "visible"),
    ]
    assert [p.samples for p in files.plans(read, [200], 1, None)] == [1, 1]
    with pytest.raises(files.FilesError, match=r"--length 2000: the model has 1024 positions"):
        files.plans(read, [200, 2000], None, 1024)
    with pytest.raises(files.FilesError, match="Give --length"):
        files.plans(read, [], None, None)


# ---- refusals, all before a model is loaded


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0": {"gold": "a"}}, r"some\.json, entry '0' has no 'origin_prompt'"),
        ({"0": entry(), "1": {"origin_prompt": "a"}}, r"some\.json, entry '1' has no 'gold'"),
        ({"0": entry(gold={"all_classes": ["a"]})}, r"entry '0', 'gold' has no 'answers'"),
        ({"0": entry(gold=[])}, r"entry '0': 'gold' is empty"),
        ({"0": entry(gold=[" ", "a"])}, r"entry '0': 'gold' is empty"),
        ({"0": entry(gold=7)}, r"entry '0': 'gold' is empty or no text"),
        ({"0": entry(" \n")}, r"entry '0': 'origin_prompt' is empty"),
        ({"0": "a prompt"}, r"entry '0' has no 'origin_prompt'"),
        ([entry()], r"some\.json is no JSON object"),
        ({}, r"some\.json is no JSON object"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_name_and_field(
    content: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(files.FilesError, match=message) as raised:
        files.read(write(tmp_path, some=content))
    assert "A file maps an index to an object" in str(raised.value)


def evaluated(folder: Path, *options: str, model: Path | str = "/no/model") -> Any:
    return CliRunner().invoke(
        app, ["eval", "--files", str(folder), "--model", str(model), *options]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--suite", "qaspr"],
            r"has no file qaspr\.json\. Did you mean 'qasper'\? Allowed: qasper",
        ),
        (["--suite", "needle"], r"has no file needle\.json"),
        (["--protocol", "hidden"], r"--protocol hidden: .* can only be visible"),
    ],
)
def test_what_the_files_do_not_have_is_refused_before_a_model_is_loaded(
    options: list[str], message: str, tmp_path: Path
) -> None:
    done = evaluated(write(tmp_path, qasper={"0": entry()}), *options)
    with pytest.raises(KVPressError, match=message):
        raise done.exception


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("{}")
    for folder, message in ((tmp_path, r"holds no \.json"), (tmp_path / "no", "is not a folder")):
        with pytest.raises(files.FilesError, match=message):
            raise evaluated(folder).exception
    (tmp_path / "broken.json").write_text('{"0": ')
    with pytest.raises(files.FilesError, match=r"broken\.json cannot be read as JSON"):
        raise evaluated(tmp_path).exception


# ---- the command


def test_the_command_goes_on_and_its_tables_need_no_folder(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Also a file whose name is that of a task of our own, which is scored in another way."""
    contents = {str(i): entry(f"{i}{LONG}", ["blue", "grey"]) for i in range(3)}
    folder, out = write(tmp_path / "data", needle=contents, other=contents), tmp_path / "a.jsonl"
    options = ["--suite", "needle", "--suite", "other", "--length", "256", "--samples", "2"]
    options += ["--policy", "full,streaming_llm:budget=0.5", "--out", str(out), "--json"]
    first = evaluated(folder, *options, model=tiny_model)
    assert first.exit_code == 0, first.exception or first.output
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2 * 3
    out.write_text("".join(lines[:5]) + lines[5][:40])  # killed while it wrote a line
    again = evaluated(folder, *options, model=tiny_model)
    made, before = (json.loads(done.stdout) for done in (again, first))
    assert made[:4] == before[:4]  # with their seconds: these were not run again
    assert [{**c, "seconds": 0} for c in made] == [{**c, "seconds": 0} for c in before]
    third = evaluated(folder, *options, model=tiny_model)
    assert json.loads(third.stdout) == made and "Nothing was measured" in third.stderr
    assert "Nothing" not in first.output + again.output
    other = evaluated(write(tmp_path / "more", needle=contents), *options[4:], model=tiny_model)
    with pytest.raises(KVPressError, match=r"other settings \(files: "):
        raise other.exception

    whole = (folder / "other.json").read_text()
    (folder / "other.json").write_text(whole.replace("blue", "pink"))
    changed = evaluated(folder, *options, model=tiny_model)
    with pytest.raises(KVPressError, match=r"other settings \(files: "):
        raise changed.exception

    shutil.rmtree(folder)
    text = CliRunner().invoke(app, ["report", str(out)]).stdout
    assert re.search(r"^## needle, 256 tokens, \d+ samples, question visible", text, re.M)
    assert text.count("The score is the share of right tokens.") == 2
    blocks = list(table.blocks(load(out)))
    for block in blocks:
        full, evicted, floor = block.lines
        assert 0.45 < evicted.kept < full.kept and floor.kept is None
        assert evicted.kl > 0 and full.kl == 0 and full.nll.samples == 2
    assert plots.needles(load(out)) is None and plots.quality(blocks) is not None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--files", ".", "--quick", "--text", "a.txt", "--seed", "1"], "--quick, --seed, --text"),
        (["--files", ".", "--limit", "2"], "--limit"),
        (["--chat", "--max-new-tokens", "9"], "--chat, --max-new-tokens"),
        (["--task-folder", ".", "--metadata", "{}"], "--metadata, --task-folder"),
        (["--lm-eval", "gsm8k", "--out", "a", "--suite", "copy"], "--suite cannot be used"),
        (["--lm-eval", "gsm8k", "--protocol", "both", "--stepwise"], "--protocol, --stepwise"),
        (["--lm-eval", "a", "--quick", "--length", "200"], "--length, --quick"),
        (["--lm-eval", "a", "--samples", "2", "--text", "a"], "--samples, --text"),
        (["--lm-eval", "a", "--files", ".", "--seed", "0"], "--files, --seed"),
        (["--lm-eval", "a", "--metadata", "{"], "--metadata { is no JSON"),
        (["--lm-eval", "a", "--metadata", "[]"], "--metadata [] is no JSON object"),
    ],
)
def test_options_that_would_change_nothing_are_refused(options: list[str], named: str) -> None:
    done = CliRunner().invoke(app, ["eval", "--model", "/no/model", *options])
    assert done.exit_code == 2 and named in " ".join(done.output.replace("│", "").split())
