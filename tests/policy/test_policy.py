"""Reading, loading, checking and combining policies."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest

from kvpress.errors import BudgetError, PolicyError
from kvpress.policy import Recipe
from kvpress.policy.budget import Budget
from kvpress.policy.loading import available, load_policy, parse

FILE = '''
"""A policy of a user's own."""
from __future__ import annotations
from dataclasses import dataclass
from torch import Tensor
from kvpress.policy import Budget, Policy, Slots, option

@dataclass(frozen=True, kw_only=True)
class Oldest(Policy):
    budget: Budget = option(0.5, "kept")
    flip: bool = option(False, "keep the newest")
    def score(self, slots: Slots) -> Tensor:
        return slots.position_BHS if self.flip else -slots.position_BHS
'''


def test_options_get_their_declared_types() -> None:
    (policy,) = parse(
        "keyformer:budget=0.6,recent=none,tau_end=3,window=64,normalise_age=true"
    ).policies
    assert (policy.budget, policy.recent, policy.tau_end) == (Budget.parse(0.6), None, 3.0)
    assert (policy.window, policy.normalise_age, policy.noise) == (64, True, "fresh")
    assert load_policy("keyformer", budget=0.6).budget == policy.budget
    assert str(parse("snapkv:window=8")) == "snapkv:budget=0.5,window=8,pool=7,sink=0,interval=0"
    assert parse(str(parse("keyformer"))) == parse("keyformer")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "keyfomer",
            r"Unknown policy 'keyfomer'. Did you mean 'keyformer'\? Allowed: adakv, d2o",
        ),
        ("keyformer:bugdet=0.5", r"no option 'bugdet'. Did you mean 'budget'"),
        (
            "keyformer:noise=fresch",
            r"noise=fresch .* must be 'fresh' or 'frozen'.* Did you mean 'fresh'",
        ),
        ("keyformer:recent_ratio=1.5", "out of range: allowed are values from 0 to 1"),
        ("keyformer:tau_init=0", "out of range"),
        ("keyformer:interval=2.5", "must be int"),
        ("keyformer:window=few", "must be int or 'all'"),
        ("keyformer:normalise_age=yes", "must be bool"),
        ("keyformer:tau_end=nan", "must be float"),
        ("keyformer:budget", "Option 'budget' of policy 'keyformer' is not of the form key=value"),
        ("keyformer:budget=0.5,sink", "not of the form key=value"),
        ("keyformer:sink=1,sink=2", "given twice"),
        ("", "has no name"),
        ("full+", "has no name"),
        ("keyformer+h2o", "'keyformer' and 'h2o' both replace the stage"),
        ("nowhere.py", "There is no policy file"),
        ("json:loads", "not a policy class"),
        ("no_such_module:Thing", "cannot be loaded"),
    ],
)
def test_wrong_specifications_say_what_is_allowed(spec: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(spec)


@pytest.mark.parametrize(
    ("spec", "better"),
    [
        ("h2o budget=0.5", "h2o:budget=0.5"),
        ("H2O", "h2o"),
        ("SnapKVPress", "snapkv"),
        ("StreamingLLM", "streaming_llm"),
        ("h2o:budget:0.5", "h2o:budget=0.5"),
        ("h2o:budget==0.5", "h2o:budget=0.5"),
        ("h2o(budget=0.5, sink=4)", "h2o:budget=0.5,sink=4"),
        ("h2o:budget=0.5;sink=4", "h2o:budget=0.5,sink=4"),
        ("h2o:budget=0.5:sink=4", "h2o:budget=0.5,sink=4"),
        ("streaming_llm:sink=4 budget=256", "streaming_llm:sink=4,budget=256"),
        ("h2o:0.5", "h2o:budget=0.5"),
        ("h2o 256MiB", "h2o:budget=256MiB"),
        ("h2o:budget=0,5", "h2o:budget=0.5"),
        ("h2o:budget=50%", "h2o:budget=0.5"),
        ("h2o:compression_ratio=0.3", "h2o:budget=0.7"),
        ("h2o:Budget=0.5", "h2o:budget=0.5"),
        ("keyformer:bugdet=0.5", "keyformer:budget=0.5"),
        ("h2o:budget=0.5,quant", "h2o:budget=0.5+quant"),
        ("h2o | quant", "h2o+quant"),
    ],
)
def test_what_was_meant_is_written_out(spec: str, better: str) -> None:
    with pytest.raises((PolicyError, BudgetError), match=re.escape(f"Write it as {better!r}.")):
        parse(spec)
    parse(better)


@pytest.mark.parametrize(
    "spec",
    ["h2o:sink=1,sink=2", "h2o:budget", "QFilterPress", "", "x.py:budget:0.5", "h2o:a=b"],
)
def test_nothing_is_put_into_the_mouth_of_who_may_mean_another_thing(spec: str) -> None:
    with pytest.raises(PolicyError) as error:
        parse(spec)
    assert "Write it as" not in str(error.value)


def test_options_beside_the_specification_are_shown_their_place() -> None:
    import helpers

    import kvpress

    model = helpers.tiny()
    for policy, options, message in (
        ("snapkv", {"budget": 0.5}, "write kvpress.attach(model, 'snapkv:budget=0.5')."),
        ("h2o:sink=2", {"budget": 256}, "write kvpress.attach(model, 'h2o:sink=2,budget=256')."),
        ("h2o", {"pagesize": 8}, "Did you mean 'page_size'?"),
        (load_policy("h2o"), {"budget": 0.5}, "write kvpress.attach(model, 'name:budget=0.5')."),
    ):
        with pytest.raises(PolicyError, match=re.escape(message)):
            kvpress.attach(model, policy, **options)
    assert kvpress.engine_of(model) is None


@pytest.mark.parametrize("wrong", [None, 5, [], object()])
def test_what_is_not_a_policy_is_refused(wrong: Any) -> None:
    with pytest.raises(PolicyError, match="is not a policy"):
        parse(wrong)


@pytest.mark.parametrize(
    "spec", ["h2o:budget=0", "h2o:budget=1.5", "streaming_llm:budget=3", "snapkv:budget=16"]
)
def test_wrong_budgets_are_refused_before_anything_runs(spec: str) -> None:
    with pytest.raises(BudgetError, match=r"Policy '.*': "):
        parse(spec)


def test_policies_combine_where_stages_differ() -> None:
    recipe = parse("full+h2o:budget=0.3")
    assert recipe == parse(["full", load_policy("h2o", budget=0.3)])
    assert recipe.limits is not None and recipe.limits.budget == Budget.parse(0.3)
    assert recipe.stage("score").name == "h2o"
    assert recipe.stage("allocate").overrides("allocate") is False


def test_a_policy_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "oldest.py"
    path.write_text(FILE)
    (policy,) = parse(f"{path}:budget=0.25,flip=true").policies
    assert (policy.name, policy.flip) == ("oldest", True)
    assert "oldest" not in available()
    path.write_text(FILE + "\nclass Second(Policy):\n    pass\n")
    with pytest.raises(PolicyError, match="defines 2 policies"):
        parse(str(path))


def test_a_policy_from_module_and_attribute() -> None:
    assert parse("kvpress.policies.h2o:H2O").policies == parse("h2o").policies
    assert parse("kvpress.policies.h2o:H2O:budget=0.3") == parse("h2o:budget=0.3")


def test_a_policy_from_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("mine", "kvpress.policies.tova:TOVA", "kvpress.policies")
    monkeypatch.setattr("kvpress.policy.loading._entry_points", lambda: [point])
    assert type(parse("mine").policies[0]).__name__ == "TOVA"
    assert "mine" in available()


def test_policies_are_frozen_and_hashable() -> None:
    policy = load_policy("tova")
    with pytest.raises(AttributeError):
        policy.budget = 3  # type: ignore[attr-defined]
    assert hash(policy) == hash(load_policy("tova"))


def test_a_budget_that_nobody_can_meet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "idle.py"
    path.write_text(FILE[: FILE.index("    def score")])
    with pytest.raises(PolicyError, match="neither scores nor selects"):
        parse(str(path))
    assert Recipe(parse("full").policies).limits is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    def score(self, slots):\n        return slots.seen_B\n", "one number per slot"),
        ("    def score(self, slots):\n        return slots.position_BHS / 0 * 0\n", "NaN scores"),
        ("    def allocate(self, room):\n        return [[9]]\n    score = None\n", "must give a"),
        (
            "    def allocate(self, room):\n        return [[10 * room.slots] * 2] * 3\n"
            "    def score(self, slots):\n        return slots.position_BHS\n",
            r"allocates 900 slots .* of 3 layers, but .* allows 90",
        ),
        (
            "    def score(self, slots):\n        return slots.position_BHS\n"
            "    def select(self, slots, score, shield, keep):\n        return shield | True\n",
            "asks for exactly",
        ),
    ],
)
def test_policies_that_misbehave_are_caught(body: str, message: str, tmp_path: Path) -> None:
    import helpers

    import kvpress

    path = tmp_path / "wild.py"
    path.write_text(FILE[: FILE.index("    flip")] + body)
    with (
        pytest.raises(PolicyError, match=message),
        kvpress.attach(helpers.tiny(), str(path)) as engine,
    ):
        engine.generate(helpers.prompt(1, 30), max_new_tokens=2)


def test_a_rank_by_mass_needs_a_mass(tmp_path: Path) -> None:
    path = tmp_path / "massless.py"
    path.write_text(FILE[: FILE.index("    flip")] + '    rank = "mass_per_age"\n')
    with pytest.raises(PolicyError, match="keeps no mass"):
        parse(str(path))


def test_policy_files_that_cannot_be_run_say_why(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0")
    with pytest.raises(PolicyError, match="fails: ZeroDivisionError"):
        parse(str(path))
    path.write_text(FILE.replace("@dataclass(frozen=True, kw_only=True)", ""))
    with pytest.raises(PolicyError, match="is no dataclass"):
        parse(str(path))


@pytest.mark.parametrize(
    "spec",
    [f"keyformer:seed={2**63}", f"h2o:sink={10**30}", "snapkv:pool=4", f"tova:recent={2**60}"],
)
def test_numbers_that_cannot_work_are_refused_early(spec: str) -> None:
    with pytest.raises(PolicyError, match=r"out of range|must be odd"):
        parse(spec)
