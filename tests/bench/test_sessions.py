"""`kvpress run --session`: a chat in a file, of which only new turns are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress.bench.common.prompt import PromptError, as_turn
from kvpress.bench.run import job
from kvpress.bench.run.session import Session
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import kvpress
from kvpress.cli import app
from kvpress.errors import CacheFileError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = TEMPLATE
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval(), tokenizer


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("policy", ["full", "h2o:budget=40"])
def test_a_chat_goes_on_as_if_it_had_never_ended(
    policy: str, chat: bool, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    session, options = Session(tmp_path / "chat", chat), {"max_new_tokens": 5, "do_sample": False}
    turns = ["What is a cache?", "And why?", "Thank you."]
    results = [
        job.run(model, tokenizer, [turn], policy, session=session, **options) for turn in turns
    ]
    opening = f"<user>{turns[0]}</s>\n<assistant>" if chat else turns[0]
    ids = tokenizer(opening, return_tensors="pt")["input_ids"]
    with kvpress.attach(model, policy) as engine, torch.inference_mode():
        cache, seen = engine.new_cache(), []
        for i, result in enumerate(results):
            out = engine.generate(ids, cache=cache, **options)
            answer = out[:, ids.shape[1] :]
            assert result.texts == tokenizer.batch_decode(answer, skip_special_tokens=True)
            if out.shape[1] > cache.get_seq_length():
                model(out[:, cache.get_seq_length() :], past_key_values=cache)
            seen.append(cache.get_seq_length())
            if i + 1 < len(turns):
                closing = "</s>\n<user>" + turns[i + 1] + "</s>\n<assistant>"
                more = closing if chat else turns[i + 1]
                added = tokenizer(more, return_tensors="pt", add_special_tokens=False)
                ids = torch.cat([out, added["input_ids"]], dim=1)
    assert [result.resumed_tokens for result in results] == [None, *seen[:-1]]
    assert len(results[0].texts) == 1 and [p.name for p in tmp_path.iterdir()] == ["chat"]


def test_a_chat_in_tiers_is_resumed_as_it_is_wanted(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    options = {"max_new_tokens": 5, "do_sample": False}
    caps, found = {"device": "16MiB", "host": "16MiB"}, []
    for name, given in (("plain", {}), ("tiers", caps)):
        session = Session(tmp_path / name)
        for turn in ("What is a cache? " * 20, "And why?"):
            result = job.run(
                model, tokenizer, [turn], "full", session=session, caps=given, **options
            )
            found.append((result.texts, result.resumed_tokens))
    assert found[:2] == found[2:]
    assert sum(p.name.startswith("tiers.") for p in tmp_path.iterdir()) == 1
    with pytest.raises(CacheFileError, match="by an engine with tiers"):
        job.run(model, tokenizer, ["?"], "full", session=Session(tmp_path / "tiers"), **options)


def test_what_ends_an_answer_is_not_said_twice(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    assert as_turn(tokenizer, "Why?") == ("</s>\n", "<user>Why?</s>\n<assistant>")
    assert as_turn(AutoTokenizer.from_pretrained(tokenizer.name_or_path), "Why?") == ("", "Why?")

    class Seen:
        def __init__(self, text: str) -> None:
            self.columns, self.ids = tokenizer(text, return_tensors="pt")["input_ids"], self

        def all(self) -> Any:
            return self.columns

    for ending in ("", "<", "</s>", "</s>\n"):
        cache: Any = Seen("<user>?</s>\n<assistant>Yes." + ending)
        ids = Session(Path("chat")).ids(tokenizer, "Why?", cache)
        whole = "<user>?</s>\n<assistant>Yes.</s>\n<user>Why?</s>\n<assistant>"
        assert tokenizer.decode(ids[0]) == whole
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(PromptError, match=r"writes earlier messages otherwise .* --no-chat"):
        as_turn(tokenizer, "Why?")


def test_the_command_says_how_much_was_not_read_again(tiny_model: Path, tmp_path: Path) -> None:
    def run(*options: str) -> Any:
        given = ["run", "--model", str(tiny_model), "--session", str(tmp_path / "chat")]
        return CliRunner().invoke(app, [*given, "--max-new-tokens", "3", *options])

    first = run("--prompt", "One.")
    assert first.exit_code == 0 and "not read again" not in first.output
    second = run("--prompt", "Two.")
    assert second.exit_code == 0 and "7 tokens of the session were not read again." in second.output
    third = json.loads(run("--prompt", "Three.", "--json").output)
    assert third[0]["resumed_tokens"] == 14
    for options, said in (
        ([], "give its next turn"),
        (["--prompt", "a", "--policy", "full", "--policy", "h2o"], "one chat"),
    ):
        refused = run(*options)
        assert refused.exit_code == 2 and said in re.sub(r"[\s│]+", " ", refused.output)
