"""What the README and docs/ show: it runs as it stands there, leads somewhere, and is not typed."""

from __future__ import annotations

import importlib.util
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import typer
from each import each
from kvpress.bench.common.candidates import CACHES
from kvpress.bench.docs.__main__ import PARTS
from kvpress.bench.docs.marks import bodies

import kvpress
from kvpress.cli import app
from kvpress.policy.loading import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


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
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n((?:(?!```).)*?fork\(\).*?)```", page, re.S)
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


def test_the_first_lines_print_what_stands_below_them(capsys: pytest.CaptureFixture[str]) -> None:
    """The columns; the figures are of a real model."""
    code, shown = re.findall(r"```(?:python|text)\n(.*?)```", README, re.S)[:2]
    inputs = {"input_ids": torch.arange(1, 60)[None]}
    exec(code, {"model": families.tiny("llama"), "inputs": inputs})
    printed = capsys.readouterr().out
    assert shown.splitlines()[0].split() == next(
        line.split() for line in printed.splitlines() if line.startswith("layers")
    )


def test_the_readme_is_short_and_has_pictures() -> None:
    lines = README.splitlines()
    assert len(lines) <= 140
    assert all(len(line) <= 110 for line in lines)
    assert len(re.findall(r"^!\[.+\]\(docs/pictures/\w+\.svg\)$", README, re.M)) >= 3


# ---- links


def headings(path: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each(PAGES, name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    defined = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, re.M))
    used = set(re.findall(r"\]\[(\w+)\]", text))
    assert used <= set(defined)
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *defined.values()]:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_and_picture_is_reached_from_the_readme() -> None:
    reached, new = set(), [ROOT / "README.md"]
    while new:
        page = new.pop()
        reached.add(page)
        if page.suffix == ".md":
            links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
            found = {(page.parent / link).resolve() for link in links if "://" not in link}
            new += [path for path in found - reached if path.is_file()]
    assert set(PAGES) | set((ROOT / "docs" / "pictures").glob("*")) <= reached


# ---- commands


def commands(path: Path) -> Iterator[tuple[str, bool]]:
    """What a page says to run: lines of shell blocks, and inline code; whether it is complete."""
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        yield from ((s, True) for s in block.replace("\\\n", " ").splitlines() if s.strip())
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for code in re.findall(r"`((?:kvpress |python |scripts/|\.ci/)[^`]+)`", prose):
        if not re.search(r"…|[A-Z]{4,}", code):  # an outline of a command
            yield code, " --" in code


@each(PAGES, name_of)
def test_every_command_can_be_run(path: Path) -> None:
    """Its options, ranges and policies are those of today; nothing is run."""
    for line, complete in commands(path):
        first, *rest = shlex.split(line, comments=True)
        if first == "kvpress":
            check_own(rest, complete)
        elif first == "python" and rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]), line
        elif first == "python":
            assert (ROOT / rest[0]).is_file(), line
        elif "/" in first:
            assert (ROOT / first).exists(), line
        else:
            assert first in {"pip", "pytest", "git"}, line


def check_own(words: list[str], complete: bool) -> None:
    """Parses a command of `kvpress` as its command line does; of an incomplete one the names."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        if words[0].startswith("--") or (words[0].isupper() and not complete):
            return
        command, words = command.commands[words[0]], words[1:]
    if not complete:
        return
    policies = command.make_context(command.name, list(words)).params.get("policy") or ()
    for given in [policies] if isinstance(policies, str) else policies:
        for policy in re.split(r",(?=[a-z_0-9]+(?::|,|$|\+|-))", given):
            if policy not in CACHES and ".py" not in policy and "calibration" not in policy:
                parse(policy)


# ---- figures


def tables(text: str) -> Iterator[str]:
    """The tables of a text, each as its lines."""
    yield from (found[0] for found in re.finditer(r"(?:^\|.*\n)+", text, re.M))


@each(PAGES, name_of)
def test_every_table_of_figures_is_generated(path: Path) -> None:
    """By hand only texts stand in tables: a cell that begins with a number is a figure."""
    text = path.read_text(encoding="utf-8")
    for body in bodies(text).values():
        text = text.replace(body, "")
    for table in tables(text):
        assert not re.search(r"\| *[-+]?\d[\d.,]*(?: ?(?:%|×|ms|s|MiB|GiB|\[.*?\]))? *\|", table)


@each(PAGES, name_of)
def test_every_file_of_results_that_is_named_is_there(path: Path) -> None:
    for name in re.findall(r"bench/results/[\w.-]+\w", path.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


def test_every_generated_part_has_a_maker_and_a_place() -> None:
    found = [name for path in PAGES for name in bodies(path.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted([*PARTS, "models", "commands"])
