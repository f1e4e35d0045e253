"""What the README shows is run as it stands there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import families
import pytest
import torch

import kvpress

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


class Letters:
    """A tokenizer with a token per letter, and one that it begins texts with."""

    def __call__(
        self, text: str, add_special_tokens: bool = True, return_tensors: str = ""
    ) -> dict:
        ids = [2 + ord(letter) % (families.VOCAB - 2) for letter in text]
        return {"input_ids": torch.tensor([[1] * add_special_tokens + ids])}

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids.tolist()))


def test_one_context_and_several_questions(capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer is what the same context and question give by themselves; it is read once."""
    (code,) = re.findall(r"```python\n((?:(?!```).)*?fork\(\).*?)```", README, re.S)
    model, tokenizer, read = families.tiny("llama"), Letters(), []
    model.generation_config.do_sample = False
    context, questions = "the rain fell on the hills " * 4, ["who?", "where to?"]
    names = {"kvpress": kvpress, "torch": torch, "model": model, "tokenizer": tokenizer}
    hook = model.model.layers[0].register_forward_hook(lambda *a: read.append(a[2][0].shape[-2]))
    exec(textwrap.dedent(code), {**names, "context": context, "questions": questions})
    hook.remove()
    prompt = 1 + len(context)
    long = [tokens for tokens in read if tokens > 1]
    assert long == [prompt, *map(len, questions)]

    answers = capsys.readouterr().out.splitlines()
    for question, answer in zip(questions, answers, strict=True):
        with kvpress.attach(model, "snapkv:budget=0.5") as engine, torch.inference_mode():
            cache, ids = engine.new_cache(), tokenizer(context + question)["input_ids"]
            model(ids[:, :prompt], past_key_values=cache)
            out = engine.generate(ids, cache=cache, max_new_tokens=20)
        assert tokenizer.decode(out[0, ids.shape[1] :], True) == answer
