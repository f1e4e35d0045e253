"""Retrieval heads: what they project of ids, what they score, and which files they refuse."""

from __future__ import annotations

import json
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from families import VOCAB
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvpress.errors import PolicyError
from kvpress.formulas.head_scores import scores
from kvpress.hf.calibration import FOLDER, identity
from kvpress.hf.heads import distilled
from kvpress.hf.heads.base import with_context
from kvpress.hf.heads.loading import load_head
from kvpress.hf.heads.yarn import frequencies
from kvpress.policy.heads import NOTHING, RetrievalHead
from kvpress.store import sealed

SIZES = {"hidden": 96, "heads": 2, "group": 2, "width": 24, "channels": 16, "pairs": 3}


def sizes(**changed: int) -> distilled.Sizes:
    return distilled.Sizes(**{**SIZES, "window": 3, "far": 4, **changed})


def weights(made: distilled.Sizes, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).bfloat16().float() / 8
        for name, shape in made.shapes().items()
    }


def written(path: Path, model: Any, **changed: Any) -> Path:
    made = sizes()
    found = distilled.Trained(weights(made), made, {"seed": 0}, 7, True)
    distilled.write(path, model, found._replace(**changed))
    return path


def draft(folder: Path, **changed: Any) -> Path:
    """A random EAGLE-3 checkpoint that fits the tiny models; None removes a tensor."""
    folder.mkdir()
    config = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
    config |= {"head_dim": 16, "rope_theta": 5000.0, "max_position_embeddings": 256}
    config |= {name: value for name, value in changed.items() if name not in ("tensors",)}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed_tokens.weight": (VOCAB, 96),
        "midlayer.input_layernorm.weight": (96,),
        "midlayer.self_attn.q_proj.weight": (96, 192),
        "midlayer.self_attn.k_proj.weight": (32, 192),
        "midlayer.self_attn.v_proj.weight": (32, 192),
        "d2t": (8,),
    } | changed.get("tensors", {})
    made = {n: torch.randn(s, generator=generator) for n, s in shapes.items() if s is not None}
    save_file(made, folder / "model.safetensors")
    return folder


def whole(head: RetrievalHead, ids: Tensor) -> tuple[Tensor, Tensor]:
    position = torch.arange(ids.shape[1]).expand_as(ids)
    return head.project(with_context(ids, head.reach), position)


@pytest.fixture(params=["self", "distilled", "eagle3"])
def head(request: pytest.FixtureRequest, tmp_path: Path) -> RetrievalHead:
    model = helpers.tiny("llama")
    files = {
        "distilled": lambda: str(written(tmp_path / "head.safetensors", model)),
        "eagle3": lambda: str(draft(tmp_path / "draft")),
    }
    return load_head(files.get(request.param, lambda: "self")(), model)


# ---- what every head holds


def test_a_head_is_stateless(head: RetrievalHead) -> None:
    """Token by token, with the ids before it, gives what a whole text gives."""
    ids = helpers.prompt(2, 23)
    query, key = whole(head, ids)
    assert query.shape == (2, head.heads * head.group, 23, head.width)
    assert key.shape == (2, head.heads, 23, head.width) and query.dtype == torch.float32
    padded = with_context(ids, head.reach)
    for at in (0, 1, 9, 22):
        one = head.project(padded[:, at : at + head.reach + 1], torch.full((2, 1), at))
        torch.testing.assert_close(one[0][:, :, 0], query[:, :, at])
        torch.testing.assert_close(one[1][:, :, 0], key[:, :, at])
    again = whole(head, ids)
    assert torch.equal(again[0], query) and torch.equal(again[1], key)


def test_a_padded_row_is_the_row_alone(head: RetrievalHead) -> None:
    ids = helpers.prompt(1, 12)
    padded = torch.nn.functional.pad(ids, (5, 0), value=NOTHING)
    position = (torch.arange(17) - 5).clamp_min(0)[None]
    alone = whole(head, ids)
    beside = head.project(with_context(padded, head.reach), position)
    for x, y in zip(alone, beside, strict=True):
        torch.testing.assert_close(y[:, :, 5:], x)
        assert y.isfinite().all()


def test_projecting_takes_no_more_than_a_head_says(head: RetrievalHead) -> None:
    ids = helpers.prompt(2, 300)
    whole(head, ids)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        whole(head, ids)
    events = found.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    most = max(accumulate(size for _, size in changes))
    tokens = 2 * (300 + head.reach)
    assert 0.2 * tokens * head.floats * 4 < most <= tokens * head.floats * 4
    assert head.nbytes == sum(x.nbytes for x in own(head))


def own(head: Any) -> list[Tensor]:
    """The weights of a head that are not the target's."""
    if hasattr(head, "weights"):
        return list(head.weights.values())
    names = ("embedding_YX", "norm_X", "query", "key")
    return [getattr(head, name) for name in names if hasattr(head, name)]


def test_ids_beyond_its_reach_do_not_matter(head: RetrievalHead) -> None:
    ids = helpers.prompt(1, 20)
    first, last = ids.clone(), ids.clone()
    first[0, 19 - head.reach] = 5
    if head.reach < 19:
        last[0, 18 - head.reach] = 5
        assert torch.equal(whole(head, last)[1][:, :, 19], whole(head, ids)[1][:, :, 19])
    assert not torch.equal(whole(head, first)[1][:, :, 19], whole(head, ids)[1][:, :, 19])


def test_what_is_looked_at_depends_on_distance_alone(head: RetrievalHead) -> None:
    """Moving a text moves nothing: queries and keys turn together."""
    ids = with_context(helpers.prompt(1, 9), head.reach)
    near, far = (head.project(ids, torch.arange(start, start + 9)[None]) for start in (0, 700))
    a, b = (scores(q[:, :, -1], k, head.group) for q, k in (near, far))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_columns_must_fit(head: RetrievalHead) -> None:
    with pytest.raises(PolicyError, match=rf"\[1, {4 + head.reach}\]"):
        head.project(torch.ones(1, 6 + head.reach, dtype=torch.long), torch.arange(4)[None])


# ---- scores


def test_scores_are_the_largest_of_a_group() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 8, generator=generator)
    key = torch.randn(2, 2, 11, 8, generator=generator)
    valid = torch.rand(2, 1, 11, generator=generator) < 0.6
    valid[:, :, 0] = True
    found = scores(query, key, 3, valid)
    for b in range(2):
        for h in range(2):
            logit = query[b, 3 * h : 3 * h + 3] @ key[b, h].T / 8**0.5
            weight = logit.masked_fill(~valid[b], -torch.inf).softmax(-1)
            torch.testing.assert_close(found[b, h], weight.amax(0))
    assert not found[~valid.expand_as(found)].any()
    torch.testing.assert_close(scores(query, key, 3), scores(query, key, 3, valid | True))
    assert not scores(query, key, 3, valid & False).any()


# ---- self


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "gemma", "stablelm", "smollm3"])
def test_keys_of_the_targets_layer_are_those_of_its_cache(family: str) -> None:
    model = helpers.tiny(family)
    ids = helpers.prompt(1, 30)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    key = whole(load_head("self", model), ids)[1]
    torch.testing.assert_close(key, cache.layers[0].keys, atol=1e-5, rtol=1e-4)


def test_a_target_without_such_parts_is_refused() -> None:
    with pytest.raises(PolicyError, match="no q_proj and k_proj"):
        load_head("self", helpers.tiny("gpt2"))
    with pytest.raises(PolicyError, match="layers 0 to 2"):
        load_head("self@3", helpers.tiny("llama"))
    with pytest.raises(PolicyError, match="is not what layer 0"):
        load_head("self", helpers.tiny("granite"))  # multiplies its embeddings
    with pytest.raises(PolicyError, match="2 KV heads, the layers that keep all tokens 6 and 1"):
        load_head("self", helpers.tiny("gemma4"))


def test_a_later_layer_gets_embeddings() -> None:
    model = helpers.tiny("llama")
    first, second = (load_head(name, model) for name in ("self@0", "self@1"))
    ids = helpers.prompt(1, 9)
    assert not torch.equal(whole(first, ids)[1], whole(second, ids)[1])
    assert first.fingerprint == load_head("self", model).fingerprint != second.fingerprint


# ---- names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("selves", "neither a head nor a file"),
        ("self@first", "stands a layer"),
        ("distilled", "kvpress distill"),
        ("/nowhere/head.safetensors", "Allowed: self"),
    ],
)
def test_names_that_are_no_heads(name: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        load_head(name, helpers.tiny("llama"))


# ---- distilled


def test_a_head_in_a_file_is_the_one_that_was_written(tmp_path: Path) -> None:
    model = helpers.tiny("llama")
    made = distilled.head_of(sizes(), weights(sizes()), model)
    found = load_head(str(written(tmp_path / "head.safetensors", model)), model)
    assert found.fingerprint == made.fingerprint and found.reach == 6
    ids = helpers.prompt(2, 9)
    for x, y in zip(whole(made, ids), whole(found, ids), strict=True):
        assert torch.equal(x, y)


def test_heads_of_other_targets_are_refused_with_numbers(tmp_path: Path) -> None:
    file = str(written(tmp_path / "head.safetensors", helpers.tiny("llama")))
    for fields, said in (
        ({"vocab_size": 101}, "words of the vocabulary: 97; here it is 101"),
        ({"query_heads": 12}, "channels of an embedding: 96; here it is 192"),
        ({"num_key_value_heads": 3}, "KV heads: 2; here it is 3"),
        ({"intermediate_size": 40}, "the weights: "),
    ):
        with pytest.raises(PolicyError, match=said):
            load_head(file, helpers.tiny("llama", **fields))


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    model = helpers.tiny("llama")
    file = tmp_path / "head.safetensors"
    made = weights(sizes())
    for changed, said in (
        ({"finished": False}, "unfinished: 7 steps"),
        ({"tensors": {**made, "key": made["key"][:, :-1]}}, "has weights"),
        ({"tensors": {**made, "key": made["key"] * torch.inf}}, "cannot be a head"),
        ({"done": "7"}, "cannot be a head"),
    ):
        with pytest.raises(PolicyError, match=said):
            load_head(str(written(file, model, **changed)), model)
    sealed.write(file, made, {"kind": "heads"}, private=False)
    with pytest.raises(PolicyError, match="no retrieval head, but 'heads'"):
        load_head(str(file), model)
    whole = written(file, model).read_bytes()
    for damaged in (b"nothing", whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(PolicyError, match="not a retrieval head, or it was cut off") as raised:
            load_head(str(file), model)
        said = str(raised.value)
        assert f"head={file}" in said and "kvpress distill" in said and "cache" not in said


def test_the_heads_that_ship_are_small() -> None:
    files = list(Path(str(resources.files("kvpress.hf") / FOLDER)).glob(f"*{distilled.SUFFIX}"))
    assert files
    for file in files:
        assert file.stat().st_size < 10_000_000
        assert sealed.read(file).facts["finished"] is True


@pytest.mark.real_model
def test_the_head_of_the_demo_model_loads(demo: tuple[Any, Any]) -> None:
    found = load_head("distilled", demo[0])
    assert found.heads == 3 and identity(demo[0]) in found.fingerprint
    query, key = whole(found, torch.arange(100, 140)[None])
    assert query.isfinite().all() and key.shape == (1, 3, 40, found.width)


# ---- EAGLE-3


def test_an_eagle_head_is_the_embedding_half_of_its_projections(tmp_path: Path) -> None:
    folder, model = draft(tmp_path / "draft", max_position_embeddings=1024), helpers.tiny("llama")
    found: Any = load_head(str(folder), model)
    assert (found.heads, found.group, found.width, found.reach) == (2, 3, 16, 0)
    assert load_head(str(folder / "model.safetensors"), model).fingerprint == found.fingerprint
    with_file = {**_tensors(folder)}
    ids = helpers.prompt(1, 5)
    x = with_file["embed_tokens.weight"][ids]
    x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    x = x * with_file["midlayer.input_layernorm.weight"]
    key = x @ with_file["midlayer.self_attn.k_proj.weight"][:, :96].T
    plain = key.unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(whole(found, ids)[1][:, :, 0], plain[:, :, 0])  # position 0


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_an_eagle_head_may_use_the_targets_embedding(tmp_path: Path) -> None:
    model = helpers.tiny("llama")
    folder = draft(tmp_path / "draft", tensors={"embed_tokens.weight": None})
    found: Any = load_head(str(folder), model)
    assert torch.equal(found.embedding_YX, model.get_input_embeddings().weight)


@pytest.mark.parametrize("wanted", [256, 1024, 8192])
def test_frequencies_are_extended_as_yarn_has_it(wanted: int) -> None:
    trained, theta = 256, 5000.0
    found, scale = frequencies(16, theta, wanted / trained, trained)
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": wanted / trained}
    rope["original_max_position_embeddings"] = trained
    config = LlamaConfig(
        hidden_size=96, num_attention_heads=6, rope_parameters=rope, max_position_embeddings=wanted
    )
    known, known_scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(found, known)
    assert scale == pytest.approx(known_scale)


def test_a_draft_of_fewer_positions_is_extended_to_the_targets(tmp_path: Path) -> None:
    model = helpers.tiny("llama")  # 1,024 positions
    short: Any = load_head(str(draft(tmp_path / "short")), model)
    long: Any = load_head(str(draft(tmp_path / "long", max_position_embeddings=1024)), model)
    assert long.scale == 1.0 < short.scale
    assert (short.rotation.frequency_F <= long.rotation.frequency_F).all()
    assert short.rotation.frequency_F[-1] == pytest.approx(long.rotation.frequency_F[-1] / 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": 128}, "channels of an embedding.*: 128; the target needs 96"),
        ({"num_key_value_heads": 3}, "KV heads.*: 3; the target needs 2"),
        ({"num_attention_heads": 4}, "query heads.*: 4; the target needs 6"),
        ({"tensors": {"embed_tokens.weight": (101, 96)}}, "words.*: 101; the target needs 97"),
        ({"head_dim": 8}, r"q_proj.*\[96, 192\]; the target needs \[48, 192\]"),
        ({"tensors": {"midlayer.self_attn.k_proj.weight": None}}, "no midlayer.self_attn.k_proj"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "type 'llama3'"),
        ({"hidden_size": "64"}, "as whole numbers"),
    ],
)
def test_drafts_of_other_targets_are_refused(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(PolicyError, match=said):
        load_head(str(draft(tmp_path / "draft", **changed)), helpers.tiny("llama"))


def test_a_folder_without_a_draft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"config\.json cannot be read"):
        load_head(str(tmp_path), helpers.tiny("llama"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(PolicyError, match="no safetensors header"):
        load_head(str(tmp_path / "model.safetensors"), helpers.tiny("llama"))
