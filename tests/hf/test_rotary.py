"""How models turn their keys: what is found must give the keys that they make elsewhere."""

from __future__ import annotations

import copy
import functools
from typing import Any

import accelerate
import families
import pytest
import torch
import transformers
from families import tiny

from kvpress.errors import UnsupportedModelError
from kvpress.formulas.rotation import Rotation
from kvpress.hf.rotation_probe import rotations
from kvpress.hf.support import fingerprint

WITHOUT = {"gpt2", "gpt2-scaled", "gpt_bigcode", "opt", "bloom", "falcon-alibi", "mpt"}
# As these hybrids are made; what they hold besides says where tokens stand.
WITHOUT |= {"jamba", "zamba2", "llama4", "nemotron_h", "granitemoehybrid", "kimi_linear"}
INTERLEAVED = {"cohere", "cohere2", "glm4", "deepseek_v2", "ernie4_5"}
NOPE = {"smollm3": [1], "cohere2": [1], "flint": [1], "exaone4": [1]}  # layers
ROTATED = {"glm4": 8, "phi": 8, "stablelm": 4, "gpt_neox": 4, "mimo_v2_flash": 8}  # channels, of 16
ROTATED |= {"bamba": 8, "qwen3_next": 4, "gemma3n": 256}
OTHER = torch.tensor([0, 3, 17, 123, 611, 900, 1022])  # positions; the probe has seen none but 0
UNKNOWN = "keys that depend on their positions in an unknown way"


@torch.no_grad()
def keys_at(model: Any, position_Q: torch.Tensor) -> dict[int, torch.Tensor]:
    """The keys `[P, H, D]` of every layer with keys: one token at each position, each alone.

    Each attends to itself only, so that nothing but its own position can make a difference.
    """
    ids = torch.full((len(position_Q), 1), 5)
    out = model(ids, position_ids=position_Q[:, None], use_cache=True)
    layers, kinds = out.past_key_values.layers, fingerprint(model.config).kinds
    return {kind.index: _key(layers[kind.index], kind.latent) for kind in kinds}


def _key(layer: Any, latent: int) -> torch.Tensor:
    """The keys of an only token; of latents those with what turns behind them."""
    return (torch.cat([layer.keys, layer.values], -1) if latent else layer.keys)[:, :, 0]


def assert_turned(model: Any, found: list[Rotation | None], position_Q: torch.Tensor) -> None:
    """That keys turned from each position to the next ones are the model's own, within rounding."""
    for index, key_PHD in keys_at(model, position_Q).items():
        rotation = found[index]
        for steps in range(len(position_Q)):
            by_P1 = (position_Q.roll(-steps) - position_Q)[:, None]
            turned = key_PHD.float() if rotation is None else rotation.turn(key_PHD, by_P1)
            angles = 2 * int(position_Q.max()) * torch.finfo(torch.float32).eps
            bound = 8 * torch.finfo(key_PHD.dtype).eps + angles
            error = (turned - key_PHD.roll(-steps, 0).float()).abs().amax()
            assert error <= bound * key_PHD.float().abs().amax()


# ---- turning


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_is_a_rotation(interleaved: bool, start: int) -> None:
    rotation = Rotation(1.0 / 10000 ** (torch.arange(6) / 6), interleaved, start)
    key, query, by = torch.randn(2, 3, 5, 16), torch.randn(5, 16), torch.arange(5) * 31 - 60
    turned = rotation.turn(key, by)
    assert turned.dtype == torch.float32 and turned.shape == key.shape
    torch.testing.assert_close(rotation.turn(turned, -by), key)
    assert torch.equal(rotation.turn(key, torch.zeros(5, dtype=torch.long)), key)
    torch.testing.assert_close(turned.norm(dim=-1), key.norm(dim=-1))
    still = [*range(start), *range(start + 12, 16)]
    assert torch.equal(turned[..., still], key[..., still])
    # Dot products depend on differences of positions only, and attention on nothing else.
    here = (rotation.turn(query, by) * turned).sum(-1)
    there = (rotation.turn(query, by + 700) * rotation.turn(turned, by * 0 + 700)).sum(-1)
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(here, (query * key).sum(-1), rtol=1e-3, atol=1e-3)


def test_pairs_of_channels_turn_as_in_the_papers() -> None:
    """Equation 15 by hand: one pair of channels, from its first towards its second."""
    key, by = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor(2)
    frequency = torch.tensor([0.5, 0.1])
    cos, sin = torch.tensor(1.0).cos(), torch.tensor(1.0).sin()
    assert Rotation(frequency).turn(key, by).tolist() == [cos, 0, sin, 0]
    assert Rotation(frequency, interleaved=True).turn(key, by).tolist() == [cos, sin, 0, 0]


def test_half_precision_is_turned_in_fp32() -> None:
    rotation, key = Rotation(torch.tensor([1.0, 0.1])), torch.randn(3, 4, dtype=torch.bfloat16)
    by = torch.tensor([1, 20, 300])
    assert torch.equal(rotation.turn(key, by), rotation.turn(key.float(), by))


# ---- what is found


@pytest.mark.parametrize("family", [x for x in families.FAMILIES if x != "qwen3_5"])
def test_every_family_is_proven(family: str) -> None:
    model = tiny(family)
    found, layers = rotations(model), range(model.config.num_hidden_layers)
    kinds = {kind.index: kind for kind in fingerprint(model.config).kinds}
    without = layers if family in WITHOUT else NOPE.get(family, [])
    without = [i for i in layers if i in without or i not in kinds]
    assert [rotation is None for rotation in found] == [i in without for i in layers]
    for index, rotation in enumerate(found):
        if rotation is None:
            continue
        kind = kinds[index]
        assert rotation.interleaved == (family in INTERLEAVED) and rotation.start == kind.latent
        assert 2 * len(rotation.frequency_F) == ROTATED.get(family, kind.width - kind.latent)
    if family not in WITHOUT:  # these add positions to embeddings or scores
        assert_turned(model, found, OTHER)


@pytest.mark.parametrize("family", sorted(WITHOUT & set(families.FAMILIES) - {"llama4"}))
def test_keys_of_learned_positions_and_alibi_are_those_of_their_input(family: str) -> None:
    """No rotation is declared either: the probe did not just miss it."""
    buffers = dict(tiny(family).named_buffers())
    assert family == "falcon-alibi" or not any(name.endswith("inv_freq") for name in buffers)


@pytest.mark.parametrize("family", sorted({"gemma3", "gemma4"} & set(families.FAMILIES)))
def test_local_and_global_layers_have_their_own_frequencies(family: str) -> None:
    model = tiny(family)
    buffers = dict(model.named_buffers())
    for rotation, kind in zip(rotations(model), model.config.layer_types, strict=True):
        assert torch.equal(rotation.frequency_F, buffers[f"model.rotary_emb.{kind}_inv_freq"])


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_scaled_frequencies_are_proven(family: str, scaling: dict[str, Any]) -> None:
    """yarn also lengthens keys by a constant, which turning by differences leaves as it is."""
    model = tiny(family, rope_parameters={"rope_theta": 10000.0} | scaling)
    found, plain = rotations(model), rotations(tiny(family))
    assert_turned(model, found, OTHER)
    for scaled, unscaled in zip(found, plain, strict=True):
        assert not torch.equal(scaled.frequency_F, unscaled.frequency_F)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "glm4", "cohere2", "gpt2", "mixtral"])
def test_half_precision_models_are_proven(family: str, dtype: torch.dtype) -> None:
    """`to` rounds the frequencies too: those that the model turns by are then the rounded ones."""
    model, exact = tiny(family).to(dtype), rotations(tiny(family))
    found = rotations(model)
    for rotation, other in zip(found, exact, strict=True):
        assert (rotation is None) == (other is None)
        if rotation is not None:
            assert rotation.interleaved == other.interleaved
            assert rotation.frequency_F.dtype == torch.float32
            torch.testing.assert_close(rotation.frequency_F, other.frequency_F, rtol=8e-3, atol=0)
    if family != "gpt2":
        assert_turned(model, found, OTHER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_models_are_proven_up_to_their_last_position(dtype: torch.dtype) -> None:
    model = tiny(max_position_embeddings=131072).to(dtype)
    assert_turned(model, rotations(model), torch.tensor([0, 4999, 8192, 60000, 131071]))


def test_large_channels_do_not_hide_how_the_others_turn() -> None:
    """Biases of keys reach hundreds in Qwen 2, in channels that turn least."""
    rope = {"rope_type": "default", "rope_theta": 1e7}
    model = tiny("qwen2", rope_parameters=rope).to(torch.bfloat16)
    expected = rotations(model)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[7::16] = 400.0
    for rotation, other in zip(rotations(model), expected, strict=True):
        assert torch.equal(rotation.frequency_F, other.frequency_F)
        assert not rotation.interleaved


def test_the_embedding_of_the_probed_token_does_not_matter() -> None:
    model, expected = tiny(), rotations(tiny())
    model.model.embed_tokens.weight.data.zero_()
    for rotation, other in zip(rotations(model), expected, strict=True):
        assert torch.equal(rotation.frequency_F, other.frequency_F)


def test_numbered_modules_that_take_no_hidden_states_are_left_alone() -> None:
    model = tiny("cohere")
    model.model.embed_tokens.layer_idx = 0
    assert_turned(model, rotations(model), OTHER)


def test_windows_of_two_tokens_are_proven() -> None:
    model = tiny("mistral", sliding_window=2)
    assert_turned(model, rotations(model), OTHER)


@pytest.mark.parametrize("family", ["GPTJ", "CodeGen"])
def test_a_table_of_sines_is_proven(family: str) -> None:
    sizes = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    config = getattr(transformers, f"{family}Config")(**sizes, n_positions=1024)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    found = rotations(model)
    assert all(rotation.interleaved and len(rotation.frequency_F) == 4 for rotation in found)
    assert_turned(model, found, OTHER)


def test_the_other_direction_is_proven() -> None:
    if "NanoChatForCausalLM" not in dir(transformers):
        pytest.skip("this transformers has no NanoChat")
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.NanoChatConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.NanoChatForCausalLM(config).eval()
    found = rotations(model)
    assert all((rotation.frequency_F < 0).all() for rotation in found)
    assert_turned(model, found, OTHER)


def test_rotated_channels_may_be_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_half(q: Any, k: Any, cos: Any, sin: Any, **_: Any) -> Any:
        half = Rotation(frequency, start=8)
        return q, half.turn(k, position[0][:, None, :])

    model, position = tiny(), []
    frequency = model.model.rotary_emb.inv_freq[:4].clone()
    model.model.rotary_emb.inv_freq = frequency
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: position.insert(0, kwargs["position_ids"]), with_kwargs=True
    )
    path = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
    monkeypatch.setattr(path, last_half)
    for rotation in rotations(model):
        assert rotation.start == 8 and not rotation.interleaved
        assert torch.equal(rotation.frequency_F, frequency)


# ---- what is refused


def refused(model: Any, reason: str) -> None:
    """That the message says what was found, what is allowed and what to do."""
    with pytest.raises(UnsupportedModelError, match=r"Allowed: .*merge_keys=rotated") as caught:
        rotations(model)
    assert reason in caught.value.reason and caught.value.reason in str(caught.value)
    assert repr(model.config.model_type) in str(caught.value)


def test_frequencies_that_change_with_the_length_are_refused_before_anything_runs() -> None:
    factors = [1.0] * 8
    longrope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    longrope["original_max_position_embeddings"] = 128
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    for scaling in (dynamic, longrope):
        model = tiny(rope_parameters={"rope_theta": 10000.0} | scaling)
        model.register_forward_pre_hook(lambda *_: pytest.fail("the model runs"))
        refused(model, f"rope_type '{scaling['rope_type']}'")


def test_one_dynamic_set_of_two_is_refused() -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    changing = plain | {"rope_type": "dynamic", "factor": 2.0}
    types = {"sliding_attention": plain, "full_attention": changing}
    refused(tiny("gemma3", rope_parameters=types), "rope_type 'dynamic'")


def test_a_type_that_nobody_knows_is_refused() -> None:
    model = tiny()
    model.model.rotary_emb.rope_type = "mine"
    refused(model, "rope_type 'mine'")


def test_positions_of_several_axes_are_refused() -> None:
    """Text alone would turn like any other; images do not, and a prompt does not tell."""
    refused(tiny(rope_parameters={"rope_theta": 1e4, "mrope_section": [2, 3, 3]}), "several axes")


def test_keys_that_are_scaled_after_the_rotation_are_refused() -> None:
    """HunYuan's norm of keys has a weight per channel: with trained ones no rotation is left."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.HunYuanDenseV1Config(**sizes, **heads, max_position_embeddings=1024)
    model = transformers.HunYuanDenseV1ForCausalLM(config).eval()
    assert all(rotation is not None for rotation in rotations(model))
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.self_attn.key_layernorm.weight, 0.5, 1.5)
    refused(model, UNKNOWN)


def test_unknown_frequencies_are_refused() -> None:
    model = tiny()
    model.model.rotary_emb.inv_freq = torch.rand(4, 2)  # whatever that is
    model.model.rotary_emb.forward = lambda hidden, position_ids: (
        torch.ones(*position_ids.shape, 16) * position_ids[..., None],
        torch.zeros(*position_ids.shape, 16),
    )
    refused(model, UNKNOWN)


def test_a_model_that_ignores_position_ids_is_refused() -> None:
    """Its keys are equal for all sequences of the probe: not because they have no positions."""
    model = tiny()
    forward = model.forward

    @functools.wraps(forward)
    def counting(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.forward = counting
    refused(model, UNKNOWN)


def test_a_cache_without_one_key_per_token_is_refused() -> None:
    """Dory, for one, puts the keys of a layer into its cache twice."""
    model = tiny()
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        forward(*args, **kwargs)
        return forward(*args, **kwargs | {"attention_mask": None})

    attention.forward = twice
    refused(model, "one key per layer and token (layers of [3, 6, 3] keys for 3 tokens)")


def test_positions_with_several_axes_are_refused() -> None:
    if "qwen3_5" not in families.FAMILIES:
        pytest.skip("this transformers has no Qwen 3.5")
    refused(tiny("qwen3_5"), "several axes (M-RoPE)")


# ---- the model afterwards


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "qwen2_moe"])
def test_the_model_is_left_as_it_was(family: str) -> None:
    model = tiny(family, attention_dropout=0.5).train()
    next(model.children()).eval()  # a part of it
    state = copy.deepcopy(dict(model.named_buffers()) | model.state_dict())
    config, random = copy.deepcopy(vars(model.config)), torch.get_rng_state()
    before = [(vars(module).keys(), module.training) for module in model.modules()]
    first, second = rotations(model), rotations(model)
    assert [r is None for r in first] == [r is None for r in second]
    assert torch.equal(torch.get_rng_state(), random)
    assert vars(model.config) == config
    assert [(vars(module).keys(), module.training) for module in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    after = dict(model.named_buffers()) | model.state_dict()
    assert after.keys() == state.keys() and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_the_model_is_left_as_it_was_when_the_pass_fails() -> None:
    model = tiny().train()
    model.lm_head.forward = lambda hidden: 1 / 0
    with pytest.raises(ZeroDivisionError):
        rotations(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_a_model_draws_meanwhile_is_not_missing_later() -> None:
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, given, out: out + torch.rand(1))
    random = torch.get_rng_state()
    rotations(model)
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_found_does_not_follow_the_model() -> None:
    model = tiny()
    found = rotations(model)
    expected = [rotation.frequency_F.clone() for rotation in found]
    model.model.rotary_emb.inv_freq.zero_()
    assert all(torch.equal(r.frequency_F, f) for r, f in zip(found, expected, strict=True))


def test_offloaded_models_are_proven() -> None:
    model, expected = tiny(), rotations(tiny())
    accelerate.cpu_offload(model, torch.device("cpu"))
    for rotation, other in zip(rotations(model), expected, strict=True):
        assert torch.equal(rotation.frequency_F, other.frequency_F)
