"""Beams, samples and forks share the pages of what they have in common."""

from __future__ import annotations

import copy
import gc
import threading

import helpers
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import kvpress
from kvpress.errors import MaskError

RECIPES = ["full", "snapkv:budget=0.5", "streaming_llm:budget=0.5", "keyformer:budget=0.5"]


class Bytes(LogitsProcessor):
    """Notes the bytes that a cache holds whenever tokens are chosen."""

    def __init__(self, cache: object) -> None:
        self.cache, self.held = cache, []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert self.cache.check_integrity()
        self.held.append(self.cache.report().bytes_held)
        return scores


def held(engine: object, ids: torch.Tensor, **arguments: object) -> list[int]:
    """The bytes held after the prompt and after each step but the last."""
    cache = engine.new_cache()
    watch = Bytes(cache)
    engine.generate(ids, cache=cache, logits_processor=LogitsProcessorList([watch]), **arguments)
    return watch.held


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("chunk", [None, 500])
def test_eight_beams_hold_one_prompt(recipe: str, chunk: int | None) -> None:
    model = helpers.tiny(num_hidden_layers=2, head_dim=64, max_position_embeddings=4096)
    ids = helpers.prompt(1, 4000)
    with kvpress.attach(model, recipe) as engine:
        rest = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": chunk}
        one = held(engine, ids, num_beams=1, **rest)
        beams = held(engine, ids, num_beams=8, **rest)
    assert beams[0] < 1.2 * one[0]
    assert beams[-1] < 1.5 * one[-1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_equal_prompts_run_once_and_different_ones_do_not(recipe: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(3, 40)
    batch = ids[[1, 0, 1, 2, 0]]
    widths = []
    layer = model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache, alone = engine.new_cache(), engine.new_cache()
        logits = model(batch, past_key_values=cache, output_hidden_states=True)
        expected = model(ids, past_key_values=alone, output_hidden_states=True)
        assert widths == [3, 3]
        for b, source in enumerate([1, 0, 1, 2, 0]):
            torch.testing.assert_close(logits.logits[b], expected.logits[source])
            torch.testing.assert_close(
                logits.hidden_states[-1][b], expected.hidden_states[-1][source]
            )
            assert helpers.positions(cache, b) == helpers.positions(alone, source)
        step = torch.tensor([[5], [6], [7], [8], [5]])
        mixed = model(step, past_key_values=cache).logits
        assert cache.check_integrity()
        for b, source in enumerate([1, 0, 1, 2, 0]):
            own = engine.new_cache()
            model(ids[source : source + 1], past_key_values=own)
            one = model(step[b : b + 1], past_key_values=own).logits
            torch.testing.assert_close(mixed[b : b + 1], one, rtol=1e-4, atol=1e-5)
            assert helpers.positions(cache, b) == helpers.positions(own)
    hook.remove()


def test_prompts_that_differ_in_padding_only_are_not_equal() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with kvpress.attach(model, "full") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        assert cache.states[0].sequences.seen_B.tolist() == [20, 15]


@pytest.mark.parametrize("recipe", [*RECIPES, "h2o:budget=0.3", "tova:budget=0.4"])
def test_forks_go_on_as_if_each_were_alone(recipe: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 60)
    questions = [helpers.prompt(1, n, seed=n) for n in (7, 1, 12)]
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        context = engine.new_cache()
        model(ids, past_key_values=context)
        before = helpers.positions(context)
        forks = [context.fork() for _ in questions]
        answers = [[] for _ in questions]
        for turn in range(6):
            for fork, question, answer in zip(forks, questions, answers, strict=True):
                token = answer[-1].argmax(-1, keepdim=True) if turn else question
                answer.append(model(token, past_key_values=fork).logits[:, -1])
                assert fork.check_integrity()
        assert helpers.positions(context) == before
        for question, answer, fork in zip(questions, answers, forks, strict=True):
            alone, token = engine.new_cache(), question
            model(ids, past_key_values=alone)
            for given in answer:
                expected = model(token, past_key_values=alone).logits[:, -1]
                torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
                token = expected.argmax(-1, keepdim=True)
            assert helpers.positions(fork) == helpers.positions(alone)


def test_equal_texts_about_different_ones_are_not_equal() -> None:
    """One question to a batch of contexts, of the same lengths, which must not be merged."""
    model, ids, question = helpers.tiny(), helpers.prompt(3, 20)[[0, 1, 0]], helpers.prompt(1, 5)
    with kvpress.attach(model, "full") as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        given = model(question.repeat(3, 1), past_key_values=cache).logits
        held = [helpers.kept_keys(cache, b) for b in range(3)]
    expected = model(torch.cat([ids, question.repeat(3, 1)], dim=1)).logits[:, -5:]
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(held[0], held[2])
    assert not torch.equal(held[0], held[1])


@pytest.mark.parametrize("recipe", ["h2o:budget=0.5", "keyformer:budget=0.5", "d2o:budget=0.5"])
@pytest.mark.parametrize("interval", [0, 8])
def test_what_forks_add_up_stays_their_own_between_evictions(recipe: str, interval: int) -> None:
    """While pages are shared, masses are kept aside: the one-call step would not find them."""
    model, ids = helpers.tiny(), helpers.prompt(1, 60)
    with kvpress.attach(model, f"{recipe},interval={interval}") as engine, torch.no_grad():
        context, alone = engine.new_cache(), engine.new_cache()
        for cache in (context, alone):
            model(ids, past_key_values=cache)
        fork = context.fork()
        for token in range(13):
            step = torch.tensor([[2 + token]])
            other = torch.tensor([[70 - token]])
            model(other, past_key_values=context)
            logits = [model(step, past_key_values=c).logits for c in (fork, alone)]
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
            for a, b in zip(fork.states, alone.states, strict=True):
                columns = [state.store.dense_by_position([0]) for state in (a, b)]
                assert torch.equal(*(x["position"] for x in columns))
                torch.testing.assert_close(*(x["mass"] for x in columns), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("recipe", ["full", "snapkv:budget=0.5", "keyformer:budget=0.5"])
def test_nothing_is_written_to_pages_that_a_fork_uses(recipe: str) -> None:
    """Not even behind its own slots: what a fork saves holds no token of another text."""
    model, ids = helpers.tiny(), helpers.prompt(1, 59)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)  # reserves room for some more
        fork = cache.fork()
        stores = [state.store for state in fork.states]
        before = [store.state() for store in stores]
        for token in range(3):
            model(ids[:, token : token + 1], past_key_values=cache)
        for store, state in zip(stores, before, strict=True):
            for name, tensor in store.state().items():
                assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name


def test_shared_bytes_are_the_pages_that_both_use() -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 100)
    with kvpress.attach(model, "full", page_size=8) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        fork = cache.fork()
        fork.batch_select_indices(torch.tensor([1]))
        step = helpers.prompt(1, 1)
        for other in (None, fork):
            if other is not None:
                model(step, past_key_values=other)  # its last page is its own now
            shared = 12 if other else 13  # pages of a row of 100 or 101 tokens
            page = 8 * (2 * 16 * 4 + 4)  # keys, values, positions
            for one in (cache, fork):
                report = one.report()
                assert [layer.bytes_shared for layer in report.layers] == [2 * shared * page] * 3
                assert report.bytes_shared == 3 * 2 * shared * page
        fork.batch_repeat_interleave(3)  # rows of one cache that share pages count these once
        assert fork.report().bytes_shared == cache.report().bytes_shared == report.bytes_shared
        del fork, one, other
        gc.collect()
        assert cache.report().bytes_shared == 0


def test_forks_share_bytes_and_their_end_gives_them_back() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 600)
    with kvpress.attach(model, "snapkv:budget=0.5") as engine, torch.no_grad():
        context = engine.new_cache()
        model(ids, past_key_values=context)
        alone = context.report()
        fork = context.fork()
        assert fork.report().bytes_shared > 0.98 * alone.bytes_held
        assert alone.bytes_shared == 0
        for token in range(40):
            model(torch.tensor([[2 + token]]), past_key_values=fork)
        pools = [state.store.paging.pool for state in context.states]
        together = sum(t.nbytes for pool in pools for t in pool.tensors())
        assert together < 1.3 * alone.bytes_held
        del fork
        gc.collect()
        assert context.check_integrity()
        for token in range(40):
            model(torch.tensor([[2 + token]]), past_key_values=context)
        assert (
            sum(t.nbytes for s in context.states for t in s.store.paging.pool.tensors()) == together
        )
        assert context.report().bytes_shared == 0


def test_dropping_most_sequences_gives_their_memory_back() -> None:
    model, ids = helpers.tiny(), helpers.prompt(8, 200)
    with kvpress.attach(model, "full") as engine, torch.no_grad():
        cache, one = engine.new_cache(), engine.new_cache()
        model(ids, past_key_values=cache)
        model(ids[3:4], past_key_values=one)
        cache.batch_select_indices(torch.tensor([3]))
        assert cache.report().bytes_held <= 1.01 * one.report().bytes_held
        given, expected = (model(ids[3:4, :1], past_key_values=c).logits for c in (cache, one))
        torch.testing.assert_close(given, expected)


def test_a_large_crop_gives_memory_back() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 500)
    with kvpress.attach(model, "full") as engine, torch.no_grad():
        cache, short = engine.new_cache(), engine.new_cache()
        model(ids, past_key_values=cache)
        cache.crop(-450)
        model(ids[:, :50], past_key_values=short)
        assert cache.report().bytes_held <= 1.05 * short.report().bytes_held
        given, expected = (model(ids[:, :9], past_key_values=c).logits for c in (cache, short))
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_deep_copy_is_independent(recipe: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(2, 40)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        cache = engine.new_cache()
        model(ids, past_key_values=cache)
        fork, other = cache.fork(), copy.deepcopy(cache)
        assert other.report().bytes_shared == 0
        step = torch.tensor([[5], [6]])
        logits = [model(step, past_key_values=c).logits for c in (other, cache, fork)]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[0], logits[2], rtol=1e-4, atol=1e-5)
        assert all(c.check_integrity() for c in (cache, fork, other))


def test_forks_may_run_in_threads() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 64)
    arguments = {"max_new_tokens": 30, "do_sample": False}
    with kvpress.attach(model, "keyformer:budget=0.5") as engine, torch.no_grad():
        context = engine.new_cache()
        model(ids, past_key_values=context)
        questions = [torch.cat([ids, helpers.prompt(1, 5, seed=n)], dim=1) for n in range(4)]
        expected = [
            model.generate(q, past_key_values=context.fork(), **arguments) for q in questions
        ]
        given: dict[int, torch.Tensor] = {}

        def ask(number: int, fork: object) -> None:
            given[number] = model.generate(questions[number], past_key_values=fork, **arguments)

        threads = [threading.Thread(target=ask, args=(n, context.fork())) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(given[n], expected[n]) for n in range(4))


def total(caches: list[object]) -> int:
    """Bytes of all storages that some caches keep alive, each counted once."""
    return helpers.live_storages([state.store for cache in caches for state in cache.states])


@pytest.mark.parametrize(
    "recipe",
    ["full", "snapkv:budget=0.5", "h2o:budget=1.0", "keyformer:budget=0.5", "tova:budget=512"],
)
def test_questions_about_one_context_share_its_pages(recipe: str) -> None:
    model = helpers.tiny(head_dim=64, max_position_embeddings=4096)
    ids, questions = helpers.prompt(1, 2000), [helpers.prompt(1, 8, seed=n) for n in range(4)]
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        context = engine.new_cache()
        model(ids, past_key_values=context)
        one, forks = total([context]), [context.fork() for _ in questions]
        logits = [model(q, past_key_values=f).logits for q, f in zip(questions, forks, strict=True)]
        assert total([context, *forks]) < 2 * one
        assert all(fork.report().bytes_shared > 0.5 * one for fork in forks)
        for question, fork, given in zip(questions, forks, logits, strict=True):
            alone = engine.new_cache()
            model(ids, past_key_values=alone)
            expected = model(question, past_key_values=alone).logits
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
            assert helpers.positions(fork) == helpers.positions(alone)
            if fork.states[0].recipe.accumulates:
                masses = [c.states[2].store.dense_by_position([0])["mass"] for c in (fork, alone)]
                torch.testing.assert_close(*masses, rtol=1e-4, atol=1e-5)
            assert fork.check_integrity()


@pytest.mark.parametrize("recipe", ["full", "streaming_llm:budget=24KiB", "h2o:budget=0.5"])
def test_what_dead_forks_held_is_given_back(recipe: str) -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 600)
    with kvpress.attach(model, recipe) as engine, torch.no_grad():
        context, alone = engine.new_cache(), engine.new_cache()
        for cache in (context, alone):
            model(ids, past_key_values=cache)
        forks = [context.fork() for _ in range(8)]
        for cache in (*forks, alone):
            for token in range(60):
                model(torch.tensor([[2 + token]]), past_key_values=cache)
        one = forks[0]
        assert one.report().bytes_held <= 1.4 * alone.report().bytes_held
        del forks, context, cache
        gc.collect()
        for _ in range(40):
            for cache in (one, alone):
                model(torch.tensor([[5]]), past_key_values=cache)
        assert one.report().bytes_shared == 0
        assert one.report().bytes_held <= 1.4 * alone.report().bytes_held


def test_a_refused_pass_over_equal_prompts_loses_no_sequence() -> None:
    model, ids = helpers.tiny(), helpers.prompt(1, 20).repeat(3, 1)
    question = helpers.prompt(1, 5).repeat(3, 1)
    with kvpress.attach(model, "full") as engine, torch.no_grad():
        cache, other = engine.new_cache(), engine.new_cache()
        for each in (cache, other):
            model(ids, past_key_values=each)
        with pytest.raises(MaskError, match=r"shape \(3, 11\)"):
            model(question, attention_mask=torch.ones(3, 11), past_key_values=cache)
        with pytest.raises(MaskError, match="2-D padding masks"):
            four = torch.ones(3, 1, 5, 25, dtype=torch.bool)
            model(question, attention_mask=four, past_key_values=cache)
        assert cache.batch_size == 3
        given, expected = (model(question, past_key_values=c).logits for c in (cache, other))
        assert torch.equal(given, expected)


def test_equal_prompts_of_a_model_that_returns_more_are_left_alone() -> None:
    model, ids = helpers.tiny("mixtral"), helpers.prompt(1, 20).repeat(3, 1)
    model.config.output_router_logits = True
    with kvpress.attach(model, "full"), torch.no_grad():
        assert model(ids).router_logits[0].shape[0] == 60
