"""`kvpress distill` and `kvpress bench heads`: what is read, learned, gone on with, measured."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from kvpress.bench.common import models
from kvpress.bench.common.text import TextError
from kvpress.bench.distill import beginning, commands, recall, report, training
from kvpress.bench.distill.contexts import Context, Maker, sampled, split
from kvpress.bench.distill.facts import fact
from kvpress.bench.distill.maps import Always, Map, averaged, watch
from kvpress.bench.docs import retrieval_heads as docs
from kvpress.bench.quality import tasks
from torch import Tensor
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.errors import PolicyError
from kvpress.hf.heads import distilled
from kvpress.hf.heads.loading import load_head

ALWAYS = Always(sink=2, recent=8)
SIZES = distilled.Sizes(
    hidden=96, heads=2, group=2, width=24, channels=16, window=3, far=4, pairs=4
)


def invoke(*words: Any) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def words(count: int, seed: int = 0) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(["rain", "fell", "on", "hills", "and"]) for _ in range(count))


# ---- contexts


@pytest.mark.parametrize("number", range(4))
def test_contexts_are_as_long_as_asked_and_mark_what_asks(number: int) -> None:
    tokenizer = helpers.characters()
    held = split(tokenizer, words(9000))[0]
    maker = Maker(tokenizer, held, 4000)
    context = maker.make("train-0", number)
    assert len(context.ids) == 4000 and context == maker.make("train-0", number)
    assert context != maker.make("train-1", number)
    assert context.hot and min(context.hot) >= 0 and max(context.hot) < 4000
    if not number % 2:  # a chat whose answer has begun
        said = tokenizer.decode(context.ids[-200:]).replace(" ", "")
        assert "?" in said


def test_what_is_asked_for_was_said_before() -> None:
    tokenizer = helpers.characters()
    held = split(tokenizer, words(9000))[0]
    context = Maker(tokenizer, held, 4000).make("train-0", 2)
    text, hot = "".join(map(chr, context.ids)), context.hot
    starts = [place for place in hot if place - 1 not in hot]
    found = [text.find(text[at + 3 : at + 9]) < at for at in starts]
    assert starts and all(found)


def test_parts_of_a_text_share_nothing() -> None:
    tokenizer = helpers.characters()
    train, held = split(tokenizer, "a" * 80 + "b" * 20)
    assert len(set(train) | set(held)) == 2 and len(set(train)) == len(set(held)) == 1
    with pytest.raises(TextError, match="has 20 tokens, and a context takes 30"):
        Maker(tokenizer, held, 30)


def test_facts_are_not_those_of_the_evaluations() -> None:
    generator = random.Random(0)
    said = " ".join(" ".join(fact(generator)) for _ in range(300)).lower()
    theirs = [*tasks._THINGS, *tasks._PEOPLE, *tasks._CITIES, *tasks._SURNAMES]
    assert not [word for word in theirs if word.lower() in said]
    assert "secret code" not in said and "the value is" not in said


def test_half_of_the_queries_ask_for_something() -> None:
    context = Context(list(range(100)), list(range(60, 80)))
    places = sampled(context, 20, 50, "0")
    assert places == sorted(set(places)) and len(places) == 20 and min(places) >= 50
    assert sum(60 <= place < 80 for place in places) >= 10


# ---- what a target attends to


def test_maps_are_the_targets_attention_without_what_is_always_read() -> None:
    model = helpers.sharp("llama", attn_implementation="eager")
    ids, places = helpers.prompt(1, 40)[0].tolist(), [20, 33, 39]
    with torch.no_grad():
        true = model(torch.tensor([ids]), output_attentions=True).attentions
    seen: list[Tensor] = []
    plain = helpers.sharp("llama")
    args = (torch.tensor(ids), torch.tensor(places), ALWAYS)
    watch(plain, *args, lambda _, mass: seen.append(mass))
    assert len(seen) == 3
    for layer, found in enumerate(seen):
        weight = true[layer][0].unflatten(0, (2, 3)).mean(1)[:, places]
        for number, place in enumerate(places):
            weight[:, number, :2] = 0
            weight[:, number, place - 7 :] = 0
        torch.testing.assert_close(found, weight, atol=1e-5, rtol=1e-4)
    both = averaged(plain, ids, places, ALWAYS, range(1, 3)).mass_HAT
    torch.testing.assert_close(both.float(), (seen[1] + seen[2]) / 2, atol=1e-3, rtol=1e-3)


# ---- training


def repeating(seed: int = 0) -> Map:
    """Every query looks at what followed its own token the last time."""
    half = torch.randperm(90, generator=torch.Generator().manual_seed(seed)) + 3
    id_T = half.repeat(2)
    at_A = torch.arange(100, 160)
    mass_HAT = torch.zeros(2, 60, 180)
    mass_HAT[:, torch.arange(60), at_A - 90 + 1] = 1
    return Map(id_T, at_A, mass_HAT.half())


def trained(steps: int, how: training.How, state: training.State | None = None) -> training.State:
    embedding = helpers.tiny("llama").get_input_embeddings()
    if state is None:
        rows = embedding(torch.arange(97)).detach()
        state = training.State.begun(beginning.weights_of(SIZES, rows, how.seed))
    maps, now = [repeating(seed) for seed in range(3)], how.steps
    part = training.How(**{**vars(how), "steps": steps})
    assert now >= steps
    return training.train(SIZES, state, maps, embedding, ALWAYS, part)


def test_a_head_learns_what_followed() -> None:
    model = helpers.tiny("llama")
    rows = model.get_input_embeddings()(torch.arange(97)).detach()
    first = beginning.weights_of(SIZES, rows, 0)
    losses: list[float] = []
    state = training.State.begun({name: x.clone() for name, x in first.items()})
    maps, how = [repeating(seed) for seed in range(3)], training.How(steps=30, rate=5e-3)
    on_step = lambda _, loss: losses.append(loss)  # noqa: E731
    training.train(SIZES, state, maps, model.get_input_embeddings(), ALWAYS, how, on_step)
    assert losses[-1] < losses[0] - 0.5
    new = repeating(9)
    rank = [
        recall.scored(distilled.head_of(SIZES, x, model), new.id_T, new.at_A, ALWAYS)
        for x in (first, state.weights)
    ]
    held = [recall._share(new.mass_HAT[None].float(), score, 4, 1).mean() for score in rank]
    assert held[1] > max(0.5, float(held[0]))


def test_the_first_weights_prefer_near_tokens_as_a_power() -> None:
    decay = beginning._decay(SIZES.rotation())
    distance = torch.tensor([64.0, 256.0, 1024.0, 4096.0])
    angle = distance[:, None] * SIZES.rotation().frequency_F
    fall = (torch.cat([angle.cos(), -angle.sin()], 1) * decay).sum(1).diff()
    assert (fall < -0.4).all() and float(fall.sum()) == pytest.approx(-4.16, abs=1.0)


# ---- the commands


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(3000))
    return path


def options(tiny_model: Path, text: Path) -> list[Any]:
    sizes = ["--width", 16, "--channels", 16, "--window", 3, "--far", 4, "--queries", 16]
    counts = ["--tokens", 900, "--contexts", 2, "--steps", 6]
    return ["--model", tiny_model, "--text", text, "--threads", 1, *sizes, *counts]


def test_a_training_goes_on_to_the_same_bits(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    given = options(tiny_model, text)
    assert "bytes a token" in " ".join(invoke("distill", *given, "--out", whole).split())
    model, _ = models.load(str(tiny_model), device="cpu")
    monkeypatch.setattr(commands, "_EVERY", 2)
    train = training.train

    def interrupted(*args: Any) -> Any:
        def on_step(state: Any, loss: float) -> None:
            args[-1](state, loss)
            if state.done == 5:
                raise KeyboardInterrupt

        return train(*args[:-1], on_step)

    monkeypatch.setattr(training, "train", interrupted)
    CliRunner().invoke(app, ["distill", *map(str, given), "--out", str(parts)])
    monkeypatch.setattr(training, "train", train)
    begun = distilled.read(parts, model)
    assert (begun.done, begun.finished) == (4, False)
    with pytest.raises(PolicyError, match="unfinished: 4 steps"):
        load_head(str(parts), model)
    invoke("distill", *given, "--out", parts)
    one, other = (distilled.read(path, model) for path in (whole, parts))
    assert one.finished and other.finished and one.training == other.training
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    again = CliRunner().invoke(app, ["distill", *map(str, given), "--out", str(whole)])
    assert "Nothing was measured" in again.stderr
    with pytest.raises(PolicyError, match="Give another"):
        invoke("distill", *given, "--seed", 1, "--out", whole)


def test_heads_are_compared_on_what_was_held_out(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / docs.FILE
    numbers = ["--tokens", 900, "--contexts", 2, "--queries", 6, "--read", 64, "--read", 128]
    words = ["--model", tiny_model, "--text", text, *numbers, "--head", "self", "--out", out]
    shown = " ".join(invoke("bench", "heads", *words).split())
    assert "Attention recalled: text, by tokens" in shown
    rows = report.rows_of(json.loads(out.read_text()))
    assert len(rows) == 2 * 5 * 2 * 2
    by_name = {(r.kind, r.ranking, r.unit, r.read): r for r in rows}
    for (kind, name, unit, read), row in by_name.items():
        assert len(row.recalled) == 3 + 1
        best = by_name[kind, recall.OWN, unit, read]
        assert all(x <= y + 1e-3 for x, y in zip(row.recalled, best.recalled, strict=True)), name
        ends = zip(row.low, row.recalled, row.high, strict=True)
        assert all(low <= mean <= high for low, mean, high in ends)
    assert "## Single layers" in invoke("report", out)
    gains = report.rows_of(json.loads(out.read_text()), "gains")
    assert {row.ranking for row in gains} == {recall.RECENCY, recall.RANDOM}
    for row in gains:
        names = ("self", row.ranking)
        pair = (by_name[row.kind, name, row.unit, row.read].recalled for name in names)
        for gain, mine, theirs in zip(row.recalled, *pair, strict=True):
            assert gain == pytest.approx(mine - theirs, abs=2e-4)
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert docs.PARTS["retrieval-heads"]().count("\n") == 1 + 5 * 4
    assert "`self` over" in docs.PARTS["retrieval-heads-layers"]()


def test_no_table_without_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert {make() for make in docs.PARTS.values()} == {"Not recorded yet."}


def test_intervals_hold_the_mean_and_shrink_with_more_queries() -> None:
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.rand(4, 2, n, generator=generator) for n in (10, 200))
    (mean, low, high), (_, lower, higher) = map(recall.intervals, (few, many))
    assert all(a < b < c for a, b, c in zip(low, mean, high, strict=True)) and len(mean) == 3
    assert higher[0] - lower[0] < high[0] - low[0]


def test_shares_are_what_the_best_tokens_or_pages_hold() -> None:
    mass = torch.tensor([[[[0.4, 0.1, 0.2, 0.0, 0.0]]]])
    score = torch.tensor([[[[0.1, 0.9, 0.5, 0.3, 0.0]]]])
    assert float(recall._share(mass, score, 2, 1)) == pytest.approx(0.3 / 0.7)
    assert float(recall._share(mass, score, 2, 2)) == pytest.approx(0.5 / 0.7)
    assert torch.isnan(recall._share(mass * 0, score, 2, 1)).all()
