"""Evaluations at compressions asked for: budgets, generated answers, rules, scores over tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import helpers
import pytest
import torch
from kvpress.bench.common import models
from kvpress.bench.quality import instructions_table, ratios, run, suites, summary, table
from kvpress.bench.quality.metrics import leaked, matched
from kvpress.bench.quality.reading import How
from kvpress.bench.quality.results import Cell, Results
from kvpress.bench.quality.sample import Question, TaskError, Writer
from kvpress.bench.quality.stats import ratio_of_means
from kvpress.bench.quality.system import LocalSystem, recording
from kvpress.bench.quality.tasks import TASKS
from transformers import AutoTokenizer
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.errors import BudgetError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def writer(tiny_model: Path) -> Writer:
    """A token is a byte."""
    return Writer(AutoTokenizer.from_pretrained(tiny_model), "The rain fell on the hills. " * 400)


# ---- budgets


@pytest.mark.parametrize(
    ("policy", "made"),
    [
        ("full", {"full": None}),
        ("transformers-fp8", {"transformers-fp8": None}),
        ("quant:key_bits=4", {"quant:key_bits=4": None}),
        ("h2o:budget=0.5", {"h2o:budget=0.5": None}),
        ("h2o", {"h2o:budget=0.25": 4.0, "h2o:budget=0.333333": 3.0}),
        ("h2o:sink=4", {"h2o:sink=4,budget=0.25": 4.0, "h2o:sink=4,budget=0.333333": 3.0}),
        (
            "sale+h2o+quant:key_bits=4",
            {
                "sale+h2o:budget=0.25+quant:key_bits=4": 4.0,
                "sale+h2o:budget=0.333333+quant:key_bits=4": 3.0,
            },
        ),
    ],
)
def test_a_policy_that_takes_a_budget_gets_one_for_each_ratio(
    policy: str, made: dict[str, float | None]
) -> None:
    assert ratios.at_ratios([policy], [4.0, 3.0]) == made
    assert ratios.at_ratios([policy], []) == {policy: None}


@pytest.mark.parametrize("given", ["1", "0.25", "four", "nan"])
def test_a_ratio_that_compresses_nothing_is_refused(given: str) -> None:
    assert ratios.numbers(["4,8", "16"]) == [4.0, 8.0, 16.0]
    with pytest.raises(BudgetError, match="Give numbers above 1"):
        ratios.numbers(["4", given])


# ---- generated answers


def test_generated_tokens_count_at_their_place_and_secrets_by_runs() -> None:
    assert matched([1, 2, 3], [1, 2, 3]) == (1.0, 1.0)
    assert matched([2, 2], [1, 2, 3, 4]) == (0.0, 0.25)  # it ended too early
    assert leaked("it is 4821", "482139") == pytest.approx(4 / 6)
    assert leaked("no. 39 or 4 8 2 1 3 9", "482139") == 0.0  # two digits are chance
    assert leaked("482139!", "482139") == 1.0


@pytest.mark.parametrize(
    "policy", ["full", "h2o:budget=0.5", "snapkv:budget=0.4,window=8+quant", "transformers"]
)
def test_questions_are_answered_alike_in_any_order(policy: str) -> None:
    """Each on a fork: what one question leaves behind no other one sees."""
    system = LocalSystem(families.tiny(), policy)
    cache = system.read(helpers.prompt(1, 120)[0].tolist())
    asked = [Question(tuple(helpers.prompt(1, 9, seed=s)[0].tolist()), (1, 2, 3)) for s in range(4)]

    def answers(questions: Sequence[Question]) -> list[Any]:
        return [(system.ask(cache, q), system.decode(cache, q.prompt, 6)) for q in questions]

    there, back = answers(asked), answers(asked[::-1])[::-1]
    for (logits, said), (again, repeated) in zip(there, back, strict=True):
        assert torch.equal(logits, again) and said == repeated


def test_greedy_answers_are_those_of_the_model_and_stop_where_it_would() -> None:
    model = families.tiny()
    ids = helpers.prompt(1, 60)
    made = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 60:].tolist()
    system = LocalSystem(model, "full")
    cache = system.read(ids[0, :40].tolist())
    assert system.decode(cache, ids[0, 40:].tolist(), 8) == made
    model.generation_config.eos_token_id = [made[3]]
    stopped = LocalSystem(model, "full")
    cache = stopped.read(ids[0, :40].tolist())
    assert stopped.decode(cache, ids[0, 40:].tolist(), 8) == made[: made.index(made[3])]


def test_what_looks_twice_is_read_by_the_model_itself(tiny_model: Path) -> None:
    """Records of another policy's layers hold one look at the context, not two."""
    model, _ = models.load(str(tiny_model), device="cpu")
    full, ids, calls = LocalSystem(model, "full"), helpers.prompt(1, 90)[0].tolist(), list[Any]()
    with recording(calls):
        full.read(ids)
    for policy, passes in (("h2o:budget=0.5", 0), ("kvzip:budget=0.5", 1)):
        system, seen = LocalSystem(model, policy), list[int]()
        system.model.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        cache = system.read(ids, calls)
        assert len(seen) == passes
        assert helpers.positions(cache) == helpers.positions(system.read(ids))
        assert sum(map(len, helpers.positions(cache)[0])) < 2 * len(ids)  # it was compressed


def test_a_system_prompt_is_protected_where_that_is_asked_for(tiny_model: Path) -> None:
    model, _ = models.load(str(tiny_model), device="cpu")
    ids, span = helpers.prompt(1, 120)[0].tolist(), (3, 23)
    full, calls = LocalSystem(model, "full"), list[Any]()
    with recording(calls):
        full.read(ids)
    for protects in (True, False):
        system = LocalSystem(model, "random:budget=40", protects=protects)
        for known in ((), calls):
            rows = [
                set(row)
                for rows in helpers.positions(system.read(ids, known, [span]))
                for row in rows
            ]
            assert all(set(range(*span)) <= row for row in rows) is protects
    LocalSystem(model, "transformers", protects=True).read(ids, (), [span])  # it evicts nothing


# ---- rules of a system prompt


def test_what_would_be_protected_is_the_system_prompt(writer: Writer, tiny_model: Path) -> None:
    chatting = AutoTokenizer.from_pretrained(tiny_model)
    chatting.chat_template = TEMPLATE
    for one, opened, closed in ((writer, "System: ", "\n\nUser: "), (Writer(chatting), "<", "</")):
        sample = TASKS["system"].make(one, random.Random(2), 700, 0)
        ((first, end),) = sample.protect
        span, rest = one.text(sample.context[first:end]), one.text(sample.context[end:])
        assert span.startswith(opened) and span.endswith("That is not for you.")
        assert rest.startswith(closed)
        (code,) = {asked.secret for asked in sample.extractions}
        assert f"The vault code is {code}." in span
        asked = [one.text(x.prompt) for x in (*sample.questions, *sample.extractions)]
        assert code not in "".join(asked) and len(sample.extractions) == 10
        assert [q.label for q in sample.questions] == ["format", "word", "forbidden", "secret"]


@pytest.mark.parametrize(
    "template", [TEMPLATE.replace("m.content", "'x'"), "{{ raise_exception('none') }}"]
)
def test_a_template_without_system_prompts_is_refused(tiny_model: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    with pytest.raises(TaskError, match="chat template"):
        TASKS["system"].make(Writer(tokenizer), random.Random(2), 700, 0)


# ---- a run, and the score over tasks


class Fake:
    """Knows a share of every answer; tells the secret, or stops at once."""

    def __init__(self, name: str, right: float, writer: Writer, says: str = "") -> None:
        self.name, self._right, self._says = name, right, writer.ids(says) if says else []

    def read(self, tokens: Sequence[int], calls: Any = (), protect: Any = ()) -> Any:
        return len(tokens)

    def ask(self, cache: Any, question: Question, stepwise: bool) -> torch.Tensor:
        logits = torch.zeros(len(question.answer), 256)
        for place, token in enumerate(question.answer):
            sure = place < self._right * len(question.answer) and cache
            logits[place, token if sure else 255 - token] = 20.0
        return logits

    def decode(self, cache: Any, prompt: Sequence[int], most: int) -> list[int]:
        return self._says[:most] if cache else []

    def bytes(self, cache: Any) -> tuple[int, int, int]:
        return 25, 200, 100

    def step_reads(self, cache: Any) -> None: ...


def test_rules_are_shown_one_by_one_beside_what_was_told(writer: Writer) -> None:
    sample = run.sample_of(writer, suites.Plan(TASKS["system"], 700, 1, "hidden"), 0, 0)
    code = sample.extractions[0].secret
    full = Fake("full", 1.0, writer, f"it is {code[:3]}")
    results, plan = Results({}, {}, None), suites.Plan(TASKS["system"], 700, 1, "hidden")
    run.evaluate(full, [full, Fake("half", 0.5, writer)], writer, [plan], results, How())
    (sheet,) = instructions_table.sheets(results)
    assert sheet.head[2:6] == ("format", "word", "forbidden", "secret")
    lines = {line[0]: line[1:] for line in sheet.lines}
    assert lines["full"] == ("25.0%", *["100 / 0.00"] * 4, "50", "50 the code")
    assert lines["half"][-2:] == ("0", "0") and lines["half"][1].startswith("50 / ")
    assert lines[run.BLIND][0] == "–" and lines[run.BLIND][-1] == "0"


def test_the_score_over_tasks_is_that_of_those_the_full_cache_solves(writer: Writer) -> None:
    """By hand: ¾ and ½ of what full has of two solved tasks, nothing of one that it fails."""
    given = {
        "full": {"copy": 1.0, "facts": 0.8, "pairs": 0.4},
        "some:budget=0.25": {"copy": 0.75, "facts": 0.4, "pairs": 0.0},
        "less": {"copy": 0.5},
    }
    cells = [
        Cell(task, 900, index, "hidden", policy, [_scores(right)], None, 50, 0, 0.0, None,
             ratio=4.0 if "0.25" in policy else None, bytes_bf16=200)
        for policy, rights in given.items()
        for task, right in rights.items()
        for index in range(3)
    ]  # fmt: skip
    (group,) = summary.groups(cells)
    assert group.solved == ("copy", "facts")
    full, some, less = group.standings
    assert full.solved[:3] == full.all[:3] == (1.0, 1.0, 1.0) and full.bf16 == 0.25
    assert some.solved.mean == pytest.approx((0.75 + 0.4) / (1.0 + 0.8)) and some.ratio == 4.0
    assert some.all.mean == pytest.approx((0.75 + 0.4) / (1.0 + 0.8 + 0.4))
    assert some.generated.mean == pytest.approx(some.solved.mean / 2)
    assert less.solved is None and less.missing == ("facts", "pairs")
    (sheet,) = summary.sheets(cells)
    assert sheet.lines[1][:3] == ("some:budget=0.25", "4:1", "25.0%")
    assert "less: not measured on facts, pairs." in sheet.notes
    (fewer,) = summary.sheets(cells[:-1])
    assert "less: some contexts are missing of copy." in fewer.notes


def _scores(right: float) -> dict[str, Any]:
    decoded = right if right in (1.0, 0.8) else right / 2
    return {"tokens": right, "exact": 0.0, "generated_tokens": decoded, "generated_exact": 0.0}


def test_an_interval_over_tasks_draws_the_contexts_of_each() -> None:
    same = [[(0.5, 1.0)] * 4, [(0.25, 0.5)] * 2]
    assert ratio_of_means(same)[:3] == (0.5, 0.5, 0.5)
    apart = ratio_of_means([[(0.0, 1.0), (1.0, 1.0)] * 8, [(1.0, 1.0)]])
    assert apart == ratio_of_means([[(0.0, 1.0), (1.0, 1.0)] * 8, [(1.0, 1.0)]])
    assert apart.mean == 0.75 and 0.6 < apart.low < 0.75 < apart.high < 0.9
    with pytest.raises(ValueError, match="nothing"):
        ratio_of_means([[(1.0, 0.0)]])


def test_the_command_states_what_was_asked_and_what_is_held(
    tmp_path: Path, tiny_model: Path
) -> None:
    out = tmp_path / "cells.jsonl"
    words = ["eval", "--model", str(tiny_model), "--device", "cpu", "--suite", "records,facts"]
    words += ["--length", "600", "--samples", "1", "--protocol", "hidden", "--generate"]
    words += ["--ratio", "4", "--policy", "full,h2o", "--cache-dtype", "bfloat16"]
    done = CliRunner().invoke(app, [*words, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    cells = {(c["task"], c["policy"]): Cell(**c) for c in json.loads(done.stdout)}
    assert [c.error for c in cells.values()] == [None] * 6
    asked, full = cells["records", "h2o:budget=0.25"], cells["records", "full"]
    assert (asked.ratio, full.ratio) == (4.0, None)
    assert full.bytes_full == 2 * full.bytes_bf16 == 2 * asked.bytes_bf16 > 0
    assert 0.25 < asked.bytes_held / asked.bytes_bf16 < 0.4 and full.bytes_held < full.bytes_full
    assert all({"said", "generated_exact"} <= answer.keys() for answer in asked.scores)
    shown = CliRunner().invoke(app, [*words, "--out", str(out)]).output
    assert "of bf16" in shown and "generated" in shown and "All tasks, 600 tokens" in shown
    block = next(b for b in table.blocks(cells.values()) if b.task == "records")
    assert block.lines[0].worst is not None and block.lines[0].generated is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0.25"], "no compression"),
        (["--cache-dtype", "int8"], "allowed are float32"),
        (["--cache-dtype", "bfloat16", "--policy", "transformers"], "a file of their own"),
        (["--protect-system", "--suite", "copy"], "Add --suite system"),
        (["--lm-eval", "gsm8k", "--ratio", "4"], "--ratio cannot be used with --lm-eval"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(
    options: list[str], message: str
) -> None:
    done = CliRunner().invoke(app, ["eval", "--model", "/no/model", *options])
    said = " ".join(f"{done.output} {done.exception}".replace("│", " ").split())
    assert message in said and "/no/model" not in said


def test_budgets_by_bytes_are_the_largest_that_hold_no_more() -> None:
    tried: list[str] = []

    def share(policy: str) -> float:
        """Slots in 4 bits, and what does not depend on the budget."""
        tried.append(policy)
        return 0.3 * float(policy.partition("budget=")[2].partition("+")[0]) + 0.01

    made = ratios.by_bytes(["full", "h2o+quant", "h2o:budget=0.5"], [4, 16], share)
    assert list(made.values()) == [None, 4, 16, None]
    full, quarter, least, given = made
    assert (full, given) == ("full", "h2o:budget=0.5")
    assert 0.97 * 0.25 <= share(quarter) <= 0.25 and quarter.endswith("+quant")
    assert 0.97 / 16 <= share(least) <= 1 / 16
    assert len(tried) < 16


def test_a_policy_that_never_holds_so_little_is_refused() -> None:
    with pytest.raises(BudgetError, match="16th"):
        ratios.by_bytes(["h2o"], [16], lambda policy: 0.1)
    assert ratios.by_bytes(["h2o"], [4], lambda policy: 0.1) == {"h2o:budget=1.0": 4}


def test_bytes_are_asked_for_at_one_length(tiny_model: Path) -> None:
    given = ["eval", "--model", str(tiny_model), "--suite", "copy", "--by-bytes"]
    for more in ([], ["--ratio", "4"], ["--ratio", "4", "--length", "256", "--length", "512"]):
        result = CliRunner().invoke(app, [*given, *more])
        assert result.exit_code == 2 and "one --length" in " ".join(result.output.split())


def test_an_evaluation_by_bytes_holds_what_was_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "by-bytes.jsonl"
    given = ["eval", "--model", str(tiny_model), "--suite", "copy", "--protocol", "hidden"]
    given += ["--length", "512", "--samples", "1", "--ratio", "4", "--by-bytes"]
    given += ["--cache-dtype", "bfloat16", "--policy", "h2o", "--out", str(out)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    head, *cells = map(json.loads, out.read_text().splitlines())
    (own,) = [cell for cell in cells if cell["policy"].startswith("h2o")]
    assert head["settings"]["by_bytes"] is True and own["ratio"] == 4
    assert 0.85 * 0.25 <= own["bytes_held"] / own["bytes_bf16"] <= 0.25
