"""`kvpress bench positions`: what is compared, and with what, apart from the peer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from kvpress.bench.commands import bench
from kvpress.bench.common import models
from kvpress.bench.common.journal import read
from kvpress.bench.common.report import Sheet
from kvpress.bench.common.text import Text, default_text
from kvpress.bench.peers import agreement_table
from kvpress.bench.peers import positions as run
from kvpress.bench.peers.agreement import agreement
from kvpress.bench.peers.kept import NotingCache, positions
from kvpress.bench.peers.pairs import PAIRS, Frame, Pair, frame, recipe
from kvpress.bench.peers.positions import kept, prompts_of
from kvpress.bench.peers.remote import PREFIX
from kvpress.bench.quality import sample
from kvpress.bench.quality.sample import Question
from kvpress.bench.quality.system import Held, LocalSystem
from kvpress.bench.speed.setting import Setting
from typer.testing import CliRunner

FRAME = Frame((7, 8, 9), "\n\nRepeat.<end>\n")


# ---- positions of a cache that says none


def test_positions_are_found_in_any_order_and_without_masked_ones() -> None:
    first_HSD = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    kept_HSD = torch.stack([first_HSD[0, [5, 0, 2]], first_HSD[1, [1, 3, 4]]])
    assert positions(first_HSD, kept_HSD) == [[0, 2, 5], [1, 3, 4]]
    # Masks count slots as they are stored: slot 0 of head 0 is position 5, slot 2 of head 1 is 4.
    masked = (torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0, 2]))
    assert positions(first_HSD, kept_HSD, masked) == [[0, 2], [1, 3]]


def test_keys_that_do_not_say_where_they_stood_are_refused() -> None:
    first_HSD = torch.arange(8.0).view(1, 4, 2)
    with pytest.raises(ValueError, match="do not say which"):
        positions(first_HSD, first_HSD + 0.5)
    twins_HSD = first_HSD[:, [0, 1, 1]]
    with pytest.raises(ValueError, match="do not say which"):
        positions(twins_HSD, twins_HSD[:, :1])


def test_a_cache_notes_its_keys_before_anything_is_evicted() -> None:
    model, cache, ids = helpers.tiny("llama"), NotingCache(), helpers.prompt(1, 20)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        layer: Any = cache.layers[1]
        whole = layer.keys.clone()
        layer.keys, layer.values = layer.keys[:, :, 10:], layer.values[:, :, 10:]
        model(ids[:, :1], past_key_values=cache)
    assert torch.equal(cache.first[1], whole)


# ---- agreement


def test_rows_agree_by_what_the_fuller_one_keeps() -> None:
    ours = [[[0, 1, 2, 3], [0, 1]], [[], [5]]]
    theirs = [[[0, 1, 2, 9], [0, 1, 2, 3]], [[], [5]]]
    found = agreement([ours], [theirs])
    assert (found.equal, found.least, found.where) == (6 / 9, 0.5, (0, 1))
    assert found.mean == (0.75 + 0.5 + 1 + 1) / 4 and (found.below, found.rows) == (2, 4)
    assert agreement([ours, theirs], [ours, theirs]).equal == 1


# ---- pairs


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.press}-{pair.policy}")
def test_a_pair_is_written_with_its_budget_and_is_a_recipe(pair: Pair) -> None:
    press, policy = pair.at("0.25", FRAME)
    made = recipe(policy, FRAME.words)
    assert press.endswith("budget=0.25") and press.count(":") == 1
    assert made.limits is not None and "budget=0.25" in str(made)
    for one in made.policies:
        assert getattr(one, "instruction", None) in (None, FRAME.words)
        assert getattr(one, "sink", 0) in (0, 4, 8, len(FRAME.prefix))


def test_the_frame_is_what_a_template_puts_around_a_text() -> None:
    class Tokenizer:
        chat_template: str | None = "given"

        def apply_chat_template(self, messages: list[dict[str, str]], **given: Any) -> str:
            assert given["add_generation_prompt"] and not given["tokenize"]
            return f"<user>{messages[0]['content']}<end>\n<assistant>"

        def __call__(self, text: str, **given: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    found = frame(Tokenizer())
    assert bytes(found.prefix) == b"<user>"
    assert found.words == "\n\nRepeat the previous context exactly.<end>\n<assistant>"
    first, second = prompts_of(helpers.tiny("llama"), Tokenizer(), found, 40, 2)
    assert len(first) == len(second) == 40 and first[:6] == second[:6] and first[6:] != second[6:]
    Tokenizer.chat_template = None
    assert frame(Tokenizer()) == Frame((), "\n\nRepeat the previous context exactly.\n")


def test_the_positions_of_a_policy_are_those_of_its_cache() -> None:
    system = LocalSystem(helpers.tiny("llama"), recipe("streaming_llm:budget=10,sink=4", ""))
    assert system.name.startswith("streaming_llm:budget=10")
    assert kept(system, range(3, 43)) == 3 * [2 * [[0, 1, 2, 3, *range(34, 40)]]]


# ---- the command


class OwnPeer:
    """Stands for the peer: a press is a policy of this project, in this process."""

    def __init__(self, name: str, setting: Setting) -> None:
        self._model, _ = models.load(setting.model, device="cpu")
        self.use(name)

    def use(self, name: str) -> None:
        self.name, self._cache = name, None
        self._system = LocalSystem(self._model, name.removeprefix(PREFIX))

    def kept(self, tokens: list[int]) -> list[list[list[int]]]:
        return kept(self._system, tokens)

    def read(self, tokens: list[int]) -> int:
        self._cache = self._system.read(tokens)
        return 0

    def ask(self, cache: int, question: Question, stepwise: bool) -> torch.Tensor:
        return self._system.ask(self._cache, question, stepwise)

    def bytes(self, cache: int) -> Held:
        return Held(1, 1)

    def close(self) -> None:
        del self._system


def test_the_command_compares_pairs_and_goes_on(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = (Pair("knorm", "knorm"), Pair("knorm:sink={prefix}", "snapkv:window=9", "all of it"))
    monkeypatch.setattr(run, "PAIRS", pairs)
    monkeypatch.setattr(run, "Peer", OwnPeer)
    short = Text("short", default_text().content[:9000])  # tokens are bytes: the whole takes long
    for module in (run, sample):
        monkeypatch.setattr(module, "default_text", lambda: short)
    python, out = tmp_path / "bin" / "python", tmp_path / "positions.jsonl"
    python.parent.mkdir()
    python.touch()
    monkeypatch.setenv("KVPRESS_PEERS", str(tmp_path))
    options = ["positions", "--model", str(tiny_model), "--tokens", "300", "--contexts", "1"]
    options += ["--budget", "0.25", "--device", "cpu", "--threads", "1", "--out", str(out)]
    done = CliRunner().invoke(bench, options)
    assert done.exit_code == 0, done.output
    same, other = read(out)
    assert (same["press"], same["policy"]) == ("knorm:budget=0.25", "knorm:budget=0.25")
    assert (same["equal"], same["below"], same["rows"]) == (1, 0, 6)
    assert other["press"] == "knorm:sink=0,budget=0.25" and other["least"] < 0.99
    assert "all of it" in " ".join(done.output.split())  # lines are broken
    # Answers are asked of the pair that differs, and of the full cache.
    asked = {row["policy"] for row in read(out.with_suffix(".quality.jsonl")) if "policy" in row}
    names = {"nvidia/knorm:sink=0,budget=0.25", "snapkv:window=9,budget=0.25"}
    assert asked - {"no context"} == {"full", *names}
    again = CliRunner().invoke(bench, options)
    assert again.stdout == done.stdout and "Nothing was measured" in again.stderr


# ---- the table


def test_the_table_names_differences_and_shows_what_was_asked() -> None:
    shares = {"equal": 0.991, "least": 0.9, "where": [3, 1], "below": 2, "rows": 90}
    row = {"press": "A:budget=0.25", "policy": "a", "differs": "this", **shares}
    found = agreement_table.sheet([row], {"nvidia/A:budget=0.25": {"copy": 0.5}, "a": {}})
    assert isinstance(found, Sheet) and found.notes == ("A:budget=0.25, a: this.",)
    line = ("A:budget=0.25", "a", "99.1%", "90.0%", "3, 1", "2 of 90", "50 / –")
    assert found.lines == (line,) and found.head[-1] == "copy %"
