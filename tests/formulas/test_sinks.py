"""Learned sinks: a column of every softmax that is dropped, with a slot in front or by the LSE."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpress import ops
from kvpress.formulas import sinks
from kvpress.formulas.attention import prompt_attention
from kvpress.formulas.noise import gumbel
from kvpress.formulas.running import RunningAttention
from kvpress.formulas.sums import Observation, over_group, step_sums
from kvpress.pipe.stages.observe import prompt_sums
from kvpress.types import EMPTY

SCALE, B, N, H, Q, S, D, E = 0.3, 2, 6, 2, 7, 12, 16, 10
EXTREMES = [-torch.inf, -1e4, -3.0, 0.0, 3.0, 60.0]


def drawn(dtype: torch.dtype = torch.float32, new: int = Q) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, N, new, D), (B, H, S, D), (B, H, S, E))
    query, key, value = (torch.randn(*x, generator=generator) for x in shapes)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def holes() -> Tensor:
    """Positions of rows of different lengths: one is empty but for the tokens that attend."""
    position = torch.arange(S).expand(B, H, S).clone()
    position[0, 0, :5] = EMPTY
    position[1, 1, :3] = EMPTY
    return position


def weights(
    query: Tensor, key: Tensor, position: Tensor, sink: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over tokens and the sink in fp64: `[B, N, Q, S]`, and the sink's own."""
    new = query.shape[2]
    logits = query.double() @ key.double().repeat_interleave(N // H, 1).mT * SCALE
    slot, own = torch.arange(S), torch.arange(S - new, S)[:, None]
    seen = (slot <= own) & (position != EMPTY)[:, :, None]
    if window is not None:
        seen &= position[:, :, None] > position[:, :, S - new :, None] - window
    logits = logits.masked_fill(~seen.repeat_interleave(N // H, 1), -torch.inf)
    column = sink.double().view(1, N, 1, 1).expand(B, N, new, 1)
    found = torch.cat([column, logits], dim=-1).softmax(-1)
    return found[..., 1:], found[..., :1]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("new", "where"),
    [(new, where) for new in (1, Q) for where in ("order", "whole", "holes")]
    + [(S, "order"), (S, "whole")],
)
def test_a_prompt_sees_the_sink_beside_its_tokens(new: int, where: str, window: int | None) -> None:
    query, key, value = drawn(new=new)
    position = holes() if where == "holes" else torch.arange(S).expand(B, H, S)
    sink = torch.linspace(-2, 3, N)
    given = None if where == "order" else position
    found = prompt_attention(query, key, value, given, SCALE, window=window, sink_N=sink)
    w, own = weights(query, key, position, sink, window)
    wanted = w @ value.double().repeat_interleave(N // H, 1)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
    assert float(own.min()) > 1e-3  # it matters
    without = prompt_attention(query, key, value, given, SCALE, window=window)
    assert float((found - without).abs().max()) > 1e-2


@pytest.mark.parametrize("sink", EXTREMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_sink_and_dtype(dtype: torch.dtype, sink: float) -> None:
    query, key, value = drawn(dtype)
    sink_N = torch.full((N,), sink)
    w, _ = weights(query, key, holes(), sink_N)
    wanted = w @ value.double().repeat_interleave(N // H, 1)
    found = prompt_attention(query, key, value, holes(), SCALE, sink_N=sink_N)
    assert found.dtype == dtype and bool(found.isfinite().all())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=4 * eps, atol=4 * eps)
    if sink < -100:
        plain = prompt_attention(query, key, value, holes(), SCALE)
        torch.testing.assert_close(found, plain, rtol=4 * eps, atol=4 * eps)


def test_two_channels_keep_a_logit_that_one_would_round() -> None:
    query, key, _ = drawn(torch.bfloat16)
    sink = torch.linspace(9.0, 9.7, N)
    wide, keys, position = sinks.with_slot(query, key, holes(), sink, SCALE)
    assert wide.dtype == keys.dtype == torch.bfloat16 and int(position[..., 0].min()) == 2**31 - 1
    logits = (wide.double() @ keys.double()[:, :1, 0, :, None])[..., 0] * SCALE
    assert float((logits - sink[:, None].double()).abs().max()) < 2**-14 * 10
    one = ((sink / SCALE).bfloat16().double() * SCALE - sink.double()).abs().max()
    assert float(one) > 2**-9
    exact = query.double() @ key.double().repeat_interleave(3, 1).mT
    assert torch.equal(wide.double() @ keys[:, :, 1:].double().repeat_interleave(3, 1).mT, exact)


def test_gradients_reach_everything_and_the_sink_once() -> None:
    """The second channel holds what the first one lost, and must not count its change again."""
    query, key, value = (x.requires_grad_() for x in drawn())
    sink = torch.linspace(-2, 3, N).requires_grad_()
    leaves = (query, key, value, sink)
    out = prompt_attention(query, key, value, holes(), SCALE, sink_N=sink)
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    given = torch.autograd.grad((out * toward).sum(), leaves)
    w, _ = weights(query, key, holes(), sink)
    exact = w @ value.double().repeat_interleave(N // H, 1)
    wanted = torch.autograd.grad((exact * toward).sum(), leaves)
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sink", EXTREMES)
def test_by_the_lse_it_is_the_same(sink: float) -> None:
    query, key, value = drawn(new=1)
    position = holes()
    position[0, 0] = EMPTY  # this row sees nothing
    sink_N = torch.full((N,), sink)
    bare, _ = weights(query, key, position, torch.full((N,), -1e4))
    bare[0, : N // H] = 0.0
    out = bare @ value.double().repeat_interleave(N // H, 1)
    logits = query.double() @ key.double().repeat_interleave(N // H, 1).mT * SCALE
    hidden = (position == EMPTY).repeat_interleave(N // H, 1)[:, :, None]
    lse = logits.masked_fill(hidden, -torch.inf).logsumexp(-1)
    found, given = sinks.taken((out.float(), lse.float(), bare.float()), sink_N)
    assert given is not None
    w, own = weights(query, key, position, sink_N.clamp_min(-1e4))
    torch.testing.assert_close(given, torch.cat([own, w], -1).float(), rtol=1e-5, atol=1e-7)
    wanted = w @ value.double().repeat_interleave(N // H, 1)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-7)
    assert sinks.taken((out, lse, None), sink_N)[1] is None
    every = sinks.with_sinks(lse[..., 0].float(), sink_N)
    kept = (lse[..., 0] - every.double()).exp().nan_to_num(0.0)  # nothing over nothing
    torch.testing.assert_close(kept, w.sum(-1)[..., 0], rtol=1e-5, atol=1e-7)


def test_without_sinks_nothing_changes() -> None:
    found = (torch.ones(1), torch.ones(1), torch.ones(1))
    out, given = sinks.taken(found, None)
    assert out is found[0] and given is found[2]


@pytest.mark.parametrize("window", [None, 3])
def test_sums_of_a_prompt_are_those_of_its_tokens(window: int | None) -> None:
    query, key, _ = drawn()
    sink = torch.linspace(-2, 3, N)
    request = Observation(window=window)
    given = prompt_sums(query, key, holes(), 0, request, SCALE, 0.0, sink_N=sink)
    w, _ = weights(query, key, holes(), sink)
    wanted = w[:, :, -(window or Q) :].sum(2)
    torch.testing.assert_close(given, wanted.float(), rtol=1e-5, atol=1e-6)
    most = prompt_sums(query, key, holes(), 0, Observation(kind="max"), SCALE, 0.0, sink_N=sink)
    torch.testing.assert_close(most, w.amax(2).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 1.7])
@pytest.mark.parametrize("noise", ["none", "frozen", "fresh"])
def test_prompts_and_steps_draw_the_same_noise_for_the_sink(noise: str, tau: float) -> None:
    query, key, value = drawn(new=1)
    sink, position = torch.linspace(-2, 3, N), holes()
    request = Observation(noise=noise, tau=tau, seed=5)  # type: ignore[arg-type]
    prompt = over_group(prompt_sums(query, key, position, 3, request, SCALE, 0.0, sink_N=sink), H)
    bare, _ = weights(query, key, position, torch.full((N,), -1e4))
    logits = query.double() @ key.double().repeat_interleave(N // H, 1).mT * SCALE
    lse = logits.masked_fill((bare == 0), -torch.inf).logsumexp(-1)
    out = bare @ value.double().repeat_interleave(N // H, 1)
    _, given = sinks.taken((out.float(), lse.float(), bare.float()), sink)
    assert given is not None
    whole = torch.nn.functional.pad(position, (1, 0), value=sinks.POSITION)
    seen = torch.full((B,), S)
    step = step_sums(given[:, :, 0], whole, seen, 3, request)[..., 1:]
    torch.testing.assert_close(step, prompt, rtol=1e-4, atol=1e-6)
    if noise == "fresh" and tau == 1.0:  # and it is that of the slot's position
        w, own = weights(query, key, position, sink)
        head, at = torch.arange(N)[:, None, None], torch.tensor(S - 1)
        heads = whole.repeat_interleave(N // H, 1)[:, :, None]
        moved = torch.cat([own, w], -1).log() + gumbel(5, 3, head, at, heads)
        wanted = over_group(moved.softmax(-1)[:, :, 0, 1:], H)
        torch.testing.assert_close(prompt, wanted.float(), rtol=1e-4, atol=1e-6)


def test_running_attention_knows_its_lse() -> None:
    query, key, value = drawn()
    running = RunningAttention(query[0], H, E, SCALE, 0.0)
    assert bool((running.lse() == -torch.inf).all()) and running.lse().shape == (N, Q)
    running.add(key[0, :, : S - Q], value[0, :, : S - Q])
    running.add_own(key[0, :, S - Q :], value[0, :, S - Q :])
    sink = torch.linspace(-2, 3, N)
    found, _ = sinks.taken((running.output()[None], running.lse()[None], None), sink)
    position = torch.arange(S).expand(B, H, S)
    wanted = prompt_attention(query, key, value, position, SCALE, sink_N=sink)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-6)


def test_the_operator_takes_the_slot_whatever_its_position() -> None:
    """Its position is the largest that operators know."""
    query, key, _ = drawn()
    wide, keys, position = sinks.with_slot(query, key, holes(), torch.zeros(N), SCALE)
    numbers = (ops.Logits(SCALE), ops.Reduction(Q), ops.Noise("none", 1.0, 0, 0))
    sums = ops.attention_sums(wide, keys, position, *numbers)
    torch.testing.assert_close(sums.sum(-1), torch.full((B, N), float(Q)))
