"""The evaluation: metrics by hand, tasks by their words, runs that stop and go on."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from kvpress.bench.common import candidates
from kvpress.bench.quality import plots, run, suites, table
from kvpress.bench.quality.metrics import score
from kvpress.bench.quality.options import split_policies
from kvpress.bench.quality.reading import How
from kvpress.bench.quality.results import Cell, Results, ResultsError, load
from kvpress.bench.quality.sample import Question, Sample, TaskError, Writer
from kvpress.bench.quality.stats import estimate
from kvpress.bench.quality.system import LocalSystem, recording
from kvpress.bench.quality.tasks import TASKS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.errors import KVPressError

LETTERS = [chr(c) for c in (10, *range(32, 127))]
TEXT = "The rain fell on the hills. " * 400


@pytest.fixture
def writer() -> Writer:
    """One token per character: 96 of them and one for all others."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {"?!": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return Writer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?!"), TEXT)


def text_of(tokens: Sequence[int]) -> str:
    return "".join(LETTERS[token] for token in tokens)


# ---- metrics and intervals


def test_the_metrics_of_two_tokens_by_hand() -> None:
    """Distributions (½, ¼, ¼) and (⅛, ⅛, ¾), the right tokens 0 and 0."""
    given = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]).log()
    full = torch.tensor([[0.25, 0.625, 0.125], [0.125, 0.125, 0.75]]).log()
    made = score(given, [0, 0], full)
    assert made.exact == 0.0 and made.tokens == 0.5 and made.agreement == 0.5
    assert made.nll == pytest.approx((math.log(2) + math.log(8)) / 2, rel=1e-6)
    by_hand = 0.25 * math.log(1 / 2) + 0.625 * math.log(5 / 2) + 0.125 * math.log(1 / 2)
    assert made.kl == pytest.approx(by_hand / 2, rel=1e-5)
    assert score(given, [0, 2]).exact == 1.0 and score(given, [0, 2]).kl is None
    assert score(given + 7.0, [0, 0], full).nll == pytest.approx(made.nll, rel=1e-5)


def test_an_interval_is_the_same_each_time_and_about_as_wide_as_it_should_be() -> None:
    generator = random.Random(1)
    values = [generator.gauss(3.0, 2.0) for _ in range(400)]
    made = estimate(values)
    assert made == estimate(values) and made.samples == 400
    assert made.mean == pytest.approx(statistics.fmean(values)) and made.low < made.mean < made.high
    wide = 2 * 1.96 * statistics.stdev(values) / 20
    assert made.high - made.low == pytest.approx(wide, rel=0.15)
    assert estimate([0.4, 0.4])[:3] == (0.4, 0.4, 0.4)


# ---- tasks


@pytest.mark.parametrize("name", list(TASKS))
def test_a_sample_is_as_long_as_asked_and_the_same_for_the_same_seed(
    name: str, writer: Writer
) -> None:
    made = [TASKS[name].make(writer, random.Random(s), 700, 0) for s in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
    assert 650 <= len(made[0].context) <= 700 and all(q.answer for q in made[0].questions)


@pytest.mark.parametrize(
    "name",
    ["needle", "needles-2", "needles-4", "pairs", "variables", "facts", "records", "lines"],
)
def test_every_answer_stands_in_the_context_and_no_question_gives_it_away(
    name: str, writer: Writer
) -> None:
    sample = TASKS[name].make(writer, random.Random(3), 700, 0)
    for question in sample.questions:
        assert text_of(question.answer) in text_of(sample.context)
        assert text_of(question.answer) not in text_of(question.prompt)


@pytest.mark.parametrize("index", range(5))
def test_a_needle_stands_at_its_depth_between_sentences(index: int, writer: Writer) -> None:
    sample = TASKS["needle"].make(writer, random.Random(index), 2000, index)
    context = text_of(sample.context)
    place = context.index("\nThe secret code")
    assert sample.depth == (0.1, 0.3, 0.5, 0.7, 0.9)[index]
    assert place / len(context) == pytest.approx(sample.depth, abs=0.03)
    assert context[:place].rstrip(" ").endswith(".")


def test_copies_and_continuations_are_what_the_text_goes_on_with(writer: Writer) -> None:
    copied = TASKS["copy"].make(writer, random.Random(1), 500, 0)
    for question in copied.questions:
        cue = text_of(question.prompt).removeprefix("\n\n")
        assert cue + text_of(question.answer) in text_of(copied.context)
        assert (len(cue), len(question.answer)) == (16, 64)
    going = TASKS["perplexity"].make(writer, random.Random(1), 500, 0)
    (question,) = going.questions
    assert text_of((*going.context, *question.prompt, *question.answer)) in TEXT


def test_texts_and_suites_that_cannot_be_used_are_refused(writer: Writer) -> None:
    with pytest.raises(TaskError, match="Give a longer --text or a shorter --length"):
        TASKS["needle"].make(writer, random.Random(0), 10**6, 0)
    with pytest.raises(suites.SuiteError, match="needles-3"):
        suites.plans(["needles-3"], ["hidden"])
    with pytest.raises(suites.SuiteError, match="hidden, visible"):
        suites.plans(["needle"], ["both"])


def test_only_what_has_a_question_is_asked_in_both_protocols() -> None:
    plans = suites.plans(["offline", "needle"], suites.PROTOCOLS, lengths=[256], samples=2)
    assert len(plans) == len(set(plans))
    assert {(p.task.name, p.protocol) for p in plans if not p.task.asks} == {
        ("perplexity", "hidden"),
        ("copy", "hidden"),
    }
    assert {p.protocol for p in plans if p.task.name == "needle"} == {"hidden", "visible"}


# ---- runs


class Fake:
    """A system that knows nothing, everything, or breaks at one context."""

    def __init__(self, name: str, knows: bool, breaks_at: int = -1) -> None:
        self.name, self.reads, self._knows, self._breaks_at = name, 0, knows, breaks_at

    def read(self, tokens: Sequence[int], calls: Any = (), protect: Any = ()) -> Any:
        self.reads += 1
        if self.reads - 1 == self._breaks_at:
            raise RuntimeError("out of luck")
        return len(tokens)

    def ask(self, cache: Any, question: Question, stepwise: bool) -> torch.Tensor:
        logits = torch.zeros(len(question.answer), 97)
        if self._knows and cache:
            logits[torch.arange(len(question.answer)), list(question.answer)] = 20.0
        return logits

    def bytes(self, cache: Any) -> tuple[int, int]:
        return 50, 100

    def step_reads(self, cache: Any) -> None: ...


PLANS = [
    suites.Plan(TASKS["needle"], 300, 3, "hidden"),
    suites.Plan(TASKS["facts"], 300, 2, "visible"),
]


def evaluated(path: Path | None, *systems: Fake, writer: Writer, seed: int = 0) -> Results:
    results = Results({"seed": seed}, {"torch": "any"}, path)
    run.evaluate(Fake("full", knows=True), systems, writer, PLANS, results, How(seed))
    return results


def test_who_knows_scores_everything_and_garbage_scores_the_floor(writer: Writer) -> None:
    results = evaluated(None, Fake("full", True), Fake("garbage", False), writer=writer)
    for block in table.blocks(results):
        full, garbage, floor = block.lines
        assert (full.policy, garbage.policy, floor.policy) == ("full", "garbage", run.BLIND)
        assert full.score[:3] == (1.0, 1.0, 1.0) and full.kept == 0.5 and full.kl == 0
        assert garbage.score.mean == floor.score.mean == 0.0
        assert garbage.nll.mean == pytest.approx(math.log(97), rel=1e-4)
        assert garbage.difference[:3] == (-1.0, -1.0, -1.0)
        assert block.discriminates


def test_a_task_that_the_full_cache_fails_is_reported_so(writer: Writer) -> None:
    results = Results({}, {}, None)
    run.evaluate(Fake("full", False), [Fake("full", False)], writer, PLANS, results)
    assert not any(block.discriminates for block in table.blocks(results))
    assert all("Not discriminating" in str(made.notes) for made in table.sheets(results))


def test_a_cell_that_fails_is_a_row_and_is_run_again(tmp_path: Path, writer: Writer) -> None:
    path, unlucky = tmp_path / "cells.jsonl", Fake("unlucky", True, breaks_at=1)
    first = evaluated(path, unlucky, writer=writer)
    errors = [cell for cell in first if cell.error]
    assert [(c.policy, c.index, c.error) for c in errors] == [
        ("unlucky", 1, "RuntimeError: out of luck")
    ]
    assert "out of luck" in str(next(iter(table.sheets(first))).notes)
    again = Fake("unlucky", True)
    second = evaluated(path, again, writer=writer)
    assert again.reads == 1 and not [cell for cell in second if cell.error]
    assert len(second) == len(load(path)) == 2 * 5


def test_a_sample_that_cannot_be_made_is_rows_and_other_tasks_go_on(
    tmp_path: Path, writer: Writer
) -> None:
    path, long = tmp_path / "cells.jsonl", suites.Plan(TASKS["copy"], 10**6, 2, "hidden")
    for _ in range(2):  # it is tried again
        results, system = Results({}, {}, path), Fake("some", True)
        run.evaluate(Fake("full", True), [system], writer, [long, *PLANS], results)
        failed, good = ([c for c in results if bool(c.error) is wrong] for wrong in (True, False))
        assert {(c.task, c.index, c.policy) for c in failed} == {
            ("copy", index, policy) for index in (0, 1) for policy in ("some", run.BLIND)
        }
        assert all("TaskError: The text has" in c.error for c in failed) and len(good) == 2 * 5
    assert system.reads == 0 and len(load(path)) == 2 * 7
    (first,) = (made for made in table.sheets(results) if "copy" in str(made.title))
    assert "Give a longer --text" in str(first.notes)


def test_what_the_full_cache_answered_is_dropped_before_the_next_context(writer: Writer) -> None:
    """Like the queries, keys and values of all its layers, which take more than the model."""
    answers: list[weakref.ref[torch.Tensor]] = []

    class Watched(Fake):
        def read(self, tokens: Sequence[int], calls: Any = (), protect: Any = ()) -> Any:
            if tokens != writer.prefix:
                assert not any(answer() is not None for answer in answers)
            return super().read(tokens, calls)

        def ask(self, cache: Any, question: Question, stepwise: bool) -> torch.Tensor:
            answers.append(weakref.ref(made := super().ask(cache, question, stepwise)))
            return made

    full, results = Watched("full", True), Results({}, {}, None)
    run.evaluate(full, [full, Fake("some", True)], writer, PLANS, results)
    assert full.reads == 2 * 5 and not [cell for cell in results if cell.error]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, writer: Writer) -> None:
    path, system = tmp_path / "cells.jsonl", Fake("some", True)
    whole = evaluated(path, system, writer=writer)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:25])  # killed while it wrote a line
    rest = Fake("some", True)
    results = evaluated(path, rest, writer=writer)
    assert rest.reads == system.reads - sum('"some"' in line for line in lines[:4])
    without_times = [
        sorted(str({**vars(cell), "seconds": 0}) for cell in cells) for cells in (whole, results)
    ]
    assert without_times[0] == without_times[1]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_files_of_other_runs_are_refused(tmp_path: Path, writer: Writer) -> None:
    path, other = tmp_path / "cells.jsonl", tmp_path / "other.txt"
    evaluated(path, writer=writer)
    with pytest.raises(
        ResultsError, match=r"other settings \(seed: 0 there, 1 now\).*another --out"
    ):
        evaluated(path, writer=writer, seed=1)
    other.write_text("a list of groceries\n")
    with pytest.raises(ResultsError, match="is no results file"):
        evaluated(other, writer=writer)
    assert other.read_text() == "a list of groceries\n"


def test_files_of_before_say_the_same_without_metrics(tmp_path: Path, writer: Writer) -> None:
    """Their cells are of tasks of our own, which tell how they are scored."""
    path, old = tmp_path / "cells.jsonl", tmp_path / "old.jsonl"
    results = Results({"files": None}, {}, path)
    copies = suites.Plan(TASKS["copy"], 300, 2, "hidden")
    run.evaluate(Fake("full", True), [Fake("some", False)], writer, [copies, *PLANS], results)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[0]["settings"]["files"]
    for line in lines[1:]:
        del line["metric"], line["asks"]
    old.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert list(table.blocks(load(old))) == list(table.blocks(results))
    assert [plots.title(block) for block in table.blocks(load(old))] == [
        "copy, 300 tokens",
        "needle, 300 tokens, question hidden",
        "facts, 300 tokens, question visible",
    ]
    assert len(Results({"files": None}, {}, old)) == len(results)  # and can be gone on with


# ---- pages and pictures


def test_a_page_holds_every_number_and_needs_nothing_else(tmp_path: Path, writer: Writer) -> None:
    cells, out = tmp_path / "cells.jsonl", tmp_path / "page.html"
    evaluated(cells, Fake("full", True), Fake("<b>garbage</b>", False), writer=writer)
    assert CliRunner().invoke(app, ["report", str(cells), "--out", str(out)]).exit_code == 0
    page = out.read_text()
    assert "&lt;b&gt;garbage" in page and "<b>" not in page and page.count("<svg") == 2
    assert not re.search(r"(src|href)=.(?!#|data:)", page)
    text = CliRunner().invoke(app, ["report", str(cells)]).stdout
    assert "| full | 50.0% | 100 [100, 100] | – |" in text
    for what in ("quality", "needles"):
        picture = tmp_path / f"{what}.png"
        done = CliRunner().invoke(app, ["plot", str(cells), "--what", what, "--out", str(picture)])
        assert done.exit_code == 0 and picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("report", ["--out", "page.pdf"]),
        ("plot", ["--what", "everything"]),
        ("plot", ["--out", "a.gif"]),
        ("plot", ["--out", "/no/folder/a.png"]),
    ],
)
def test_pages_that_cannot_be_made_are_refused(
    command: str, options: list[str], tmp_path: Path, writer: Writer
) -> None:
    evaluated(tmp_path / "cells.jsonl", Fake("full", True), writer=writer)
    done = CliRunner().invoke(app, [command, str(tmp_path / "cells.jsonl"), *options])
    assert isinstance(done.exception, KVPressError)


@pytest.mark.parametrize(
    ("policy", "family"),
    [
        ("keyformer:budget=0.5", "keyformer"),
        ("keyformer:budget=0.5,sink=4", "keyformer:sink=4"),
        ("h2o:sink=4,budget=64MiB", "h2o:sink=4"),
        ("mine.py:budget=2+snapkv:window=3", "mine.py+snapkv:window=3"),
    ],
)
def test_policies_that_differ_in_their_budget_are_one_line(policy: str, family: str) -> None:
    assert plots.family(policy) == family


# ---- the engine as a system


@pytest.mark.parametrize("policy", ["full", "keyformer:budget=0.4", "snapkv:budget=0.4,window=8"])
def test_what_layers_handed_over_is_as_good_as_reading_again(policy: str, writer: Writer) -> None:
    model = families.tiny("gemma3")
    sample = TASKS["needles-2"].make(writer, random.Random(1), 200, 0)
    system, full, calls = LocalSystem(model, policy), LocalSystem(model, "full"), []
    with recording(calls):
        full.read(sample.context)
    read, replayed = system.read(sample.context), system.read(sample.context, calls)
    assert len(calls) == 3 and system.bytes(read) == system.bytes(replayed)
    for question in sample.questions:
        logits = [system.ask(cache, question) for cache in (read, replayed, read)]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(logits[0], logits[2])  # a question leaves nothing behind


def test_answers_fed_token_by_token_are_the_same_where_nothing_is_evicted(writer: Writer) -> None:
    model, sample = families.tiny(), TASKS["facts"].make(writer, random.Random(1), 300, 0)
    for name in ("full", "transformers"):
        system = LocalSystem(model, name)
        cache = system.read(sample.context)
        whole, steps = (system.ask(cache, sample.questions[0], s) for s in (False, True))
        torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


def test_the_engine_s_full_cache_answers_as_transformers_does(writer: Writer) -> None:
    model, sample = families.tiny(), TASKS["needle"].make(writer, random.Random(1), 300, 0)
    ours, theirs = (LocalSystem(model, name) for name in ("full", "transformers"))
    caches = ours.read(sample.context), theirs.read(sample.context)
    logits = [s.ask(c, sample.questions[0]) for s, c in zip((ours, theirs), caches, strict=True)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert ours.bytes(caches[0])[1] == theirs.bytes(caches[1])[0] == theirs.bytes(caches[1])[1]


def test_policies_may_be_joined_with_commas() -> None:
    given = ["full,keyformer:budget=0.5,sink=4,h2o", "mine.py:budget=9+snapkv:window=3,pool=5"]
    assert list(split_policies(given)) == [
        "full",
        "keyformer:budget=0.5,sink=4",
        "h2o",
        "mine.py:budget=9+snapkv:window=3,pool=5",
    ]


def test_the_command_measures_the_real_model(tmp_path: Path) -> None:
    """Random eviction of nearly everything leaves no more than the model knows by itself."""
    out = tmp_path / "cells.jsonl"
    options = ["--suite", "copy", "--length", "512", "--samples", "2", "--out", str(out)]
    policies = "full,random:budget=8,recent=8"
    done = CliRunner().invoke(app, ["eval", *options, "--policy", policies, "--json"])
    assert done.exit_code == 0, done.output
    cells = [Cell(**cell) for cell in json.loads(done.stdout)]
    (block,) = table.blocks(cells)
    full, evicted, floor = block.lines
    assert full.score.low > 0.85
    assert evicted.score.mean < floor.score.mean + 0.05 < 0.7 and evicted.kept < 0.05
    again = CliRunner().invoke(app, ["eval", *options, "--policy", policies, "--json"])
    assert json.loads(again.stdout) == json.loads(done.stdout)  # nothing was run again


@pytest.mark.parametrize(
    "options",
    [
        ["--suite", "nothing"],
        ["--protocol", "secret"],
        ["--policy", "none"],
        ["--text", "/no"],
    ],
)
def test_wrong_options_are_refused_before_a_model_is_loaded(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["eval", "--model", "/no/model", *options])
    assert isinstance(done.exception, KVPressError) and "/no/model" not in str(done.exception)


def test_a_question_that_vanishes_is_refused(writer: Writer) -> None:
    with pytest.raises(TaskError, match="leaves nothing"):
        writer.question("", "answer")
    assert Sample((), ()).depth is None


def test_caches_of_transformers_are_candidates(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "cells.jsonl"
    words = ["eval", "--suite", "copy", "--length", "300", "--samples", "1", "--out", str(out)]
    names = ["--policy", "full,transformers,transformers-fp8"]
    done = CliRunner().invoke(app, [*words, "--model", str(tiny_model), *names])
    assert done.exit_code == 0, done.output
    cells = [json.loads(line) for line in out.read_text().splitlines()]
    held = {cell["policy"]: cell["bytes_held"] for cell in cells if "policy" in cell}
    assert held["transformers-fp8"] < 0.4 * held["transformers"]
    for name in ("transformers-int5", "nothing"):
        refused = CliRunner().invoke(app, [*words, "--policy", name])
        assert "Unknown policy" in str(refused.exception)


def test_what_a_candidate_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(candidates.CandidateError, match="scripts/install demo,peers"):
        candidates.refuse_unknown("transformers-int4")
