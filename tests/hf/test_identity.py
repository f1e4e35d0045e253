"""Which model a saved cache belongs to: everything that its keys and values depend on counts."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import helpers
import pytest
import torch
from torch import Tensor, nn

import kvpress
from kvpress.errors import CacheError, CacheFileError
from kvpress.hf.identity import Identity


def changed(edit: Callable[[Any], Any], model: Any | None = None) -> bool:
    """Whether the digest of a model is another one after an edit, and the same for a new reader."""
    model = helpers.tiny() if model is None else model
    identity = Identity(model)
    before = identity()
    with torch.no_grad():
        edit(model)
    after = identity()
    assert Identity(model)() == after
    return after != before


def test_every_element_of_every_weight_counts() -> None:
    """Not a sample: one number of each, wherever it lies."""
    model = helpers.tiny()
    identity = Identity(model)
    seen = {identity()}
    with torch.no_grad():
        for weight in [*model.parameters(), *model.buffers()]:
            place = torch.randint(weight.numel(), ()).item()
            weight.view(-1)[place] += 1
            seen.add(identity())
    assert len(seen) == 1 + len([*model.parameters(), *model.buffers()])


def test_one_row_of_a_large_embedding_counts() -> None:
    def retrain(model: Any) -> None:
        model.model.embed_tokens.weight[row] += 1

    model = helpers.tiny(vocab_size=2000)
    weight = model.model.embed_tokens.weight
    step, width = weight.numel() // 256, weight.shape[1]
    row = next(r for r in range(2000) if all(i % step for i in range(r * width, (r + 1) * width)))
    assert changed(retrain, model)


def scale_rotary(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 2


def scale_attention(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 1.5


def scale_logits(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def swap(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(torch.full_like(model.model.norm.weight, 2))


def swap_data(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data = torch.ones(
        model.model.layers[0].mlp.up_proj.weight.shape
    )


def edit_data(model: Any) -> None:
    """Moves no version counter; seen by the elements that are always read."""
    model.model.layers[0].mlp.up_proj.weight.data.add_(1)


def edit_numpy(model: Any) -> None:
    model.model.norm.weight.detach().numpy()[3] = 7


def edit_config(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] *= 2


EDITS = [
    scale_rotary,
    scale_attention,
    scale_logits,
    swap,
    swap_data,
    edit_data,
    edit_numpy,
    edit_config,
]


@pytest.mark.parametrize("edit", EDITS)
def test_what_changes_the_output_counts(edit: Callable[[Any], None]) -> None:
    assert changed(edit)


def test_what_changes_nothing_does_not_count() -> None:
    def rename(model: Any) -> None:
        model.config.name_or_path = "elsewhere"
        model.config.use_cache = False

    def work(model: Any) -> None:
        model.generate(helpers.prompt(1, 9), max_new_tokens=3)
        model.requires_grad_(False)

    def attach(model: Any) -> None:
        kvpress.attach(model, "full")

    assert not any(changed(edit) for edit in (rename, work, attach))
    tied = helpers.tiny(tie_word_embeddings=True)
    assert not changed(work, tied)
    assert Identity(helpers.tiny())() == Identity(helpers.tiny())()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_of_a_text_do_not_count(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        channels = helpers.tiny().config.head_dim // 2
        rope |= {"short_factor": [1.0] * channels, "long_factor": [2.0] * channels}
        rope |= {"original_max_position_embeddings": 32}
    model = helpers.tiny(rope_parameters=rope, max_position_embeddings=64)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert not changed(lambda model: model(helpers.prompt(1, 80)), model)
    assert any(not torch.equal(buffers[n], buffer) for n, buffer in model.named_buffers())


def test_weights_are_read_once_and_again_only_where_they_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvpress.hf import identity as module

    model, read = helpers.tiny(vocab_size=3000, tie_word_embeddings=True), []
    given = module._bytes

    def counted(tensor: Tensor) -> Any:
        read.append(tensor.nbytes)
        return given(tensor)

    monkeypatch.setattr(module, "_bytes", counted)
    identity = Identity(model)
    identity()
    embedding = model.get_input_embeddings()
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert sorted(read)[-2:].count(embedding.weight.nbytes) == 1  # tied weights once
    assert sum(read) >= total
    read.clear()
    identity()
    assert max(read) <= 1 << 16
    assert sum(read) < sum(min(p.nbytes, 1 << 16) for p in [*model.parameters(), *model.buffers()])
    read.clear()
    with torch.no_grad():
        embedding.weight[5] += 1
    identity()
    assert [size for size in read if size > 1 << 16] == [embedding.weight.nbytes]


def test_a_weight_in_the_place_of_one_that_is_gone_is_read() -> None:
    """Freed memory is given out again: the same address says nothing."""
    model = helpers.tiny(num_hidden_layers=1, intermediate_size=1024)
    layer, identity = model.model.layers[0].mlp.up_proj, Identity(model)
    ones = torch.ones_like(layer.weight)
    addresses, digests = set(), set()
    for row in range(1, 500):  # differs only between the elements that are always read
        new = ones.clone()
        new[row, 1:200] = row
        layer.weight.data = new
        del new
        addresses.add(layer.weight.data_ptr())
        digests.add(identity())
        if len(addresses) < row:
            break
    assert len(digests) == row
    assert len(addresses) < row  # otherwise nothing was shown


def test_tensors_of_inference_mode_have_no_counter_and_are_read_each_time(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = helpers.tiny(vocab_size=2000)
    weight = model.model.embed_tokens.weight
    assert weight.is_inference()
    identity = Identity(model)
    before = identity()
    with torch.inference_mode():
        weight[1999, 1:5] += 1
        assert identity() != before
    engine = kvpress.attach(model, "full")
    with torch.inference_mode():
        model(helpers.prompt(1, 9))
    engine.cache.save(tmp_path / "cache")
    assert engine.load_cache(tmp_path / "cache").get_seq_length() == 9


def test_weights_that_accelerate_keeps_elsewhere_are_the_same_weights(tmp_path: Path) -> None:
    plain = helpers.tiny()
    expected = Identity(plain)()
    on_host, on_disk = helpers.tiny(), helpers.tiny()
    accelerate.cpu_offload(on_host, torch.device("cpu"))
    accelerate.disk_offload(on_disk, str(tmp_path), torch.device("cpu"))
    assert on_host.model.norm.weight.device.type == "meta"
    assert Identity(on_host)() == Identity(on_disk)() == expected


class Wrapped(Tensor):
    """A tensor made of another one and a number, as quantised weights are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, factor: float) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)
        made.inner, made.factor = inner, factor
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner, args[0].factor)
        return NotImplemented


class Shown(Wrapped):
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner"], {"factor": self.factor}


class Marked(nn.Parameter):
    """Has numbers of its own, and others beside them."""


def put(model: Any, weight: Tensor) -> None:
    model.model.layers[0].mlp.up_proj._parameters["weight"] = nn.Parameter(
        weight, requires_grad=False
    )


def test_what_lies_inside_a_tensor_subclass_counts() -> None:
    def quantised(inner: Tensor, factor: float = 2.0) -> str:
        model = helpers.tiny()
        put(model, Shown(inner, factor))
        return Identity(model)()

    inner = torch.zeros(4096, dtype=torch.int8)
    other = inner.clone()
    other[77] = 1
    assert quantised(inner) == quantised(inner.clone())
    assert len({quantised(inner), quantised(other), quantised(inner, 3.0)}) == 3


def test_what_shows_no_bytes_is_refused_when_a_cache_is_saved(tmp_path: Path) -> None:
    model = helpers.tiny()
    with kvpress.attach(model, "full") as engine:
        cache = engine.new_cache()
        put(model, Wrapped(torch.zeros(4, dtype=torch.int8), 1.0))
        with pytest.raises(CacheError, match=r"up_proj.weight is a .*Wrapped.*cannot be saved"):
            cache.save(tmp_path / "cache")
        hidden = torch.zeros(4).as_subclass(Marked)
        hidden.scale = torch.ones(4)
        model.model.layers[0].mlp.up_proj._parameters["weight"] = hidden
        with pytest.raises(CacheError, match="Marked"):
            cache.save(tmp_path / "cache")
        put(model, torch.zeros(4, 4).to_sparse())
        with pytest.raises(CacheError, match=r"up_proj.weight .*sparse.*cannot be saved"):
            cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # of that package
def test_quantised_weights_count() -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def scale(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.scale.add_(1)

    model = helpers.tiny()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert not changed(lambda model: model(helpers.prompt(1, 9)), model)
    assert changed(scale, model)


class Beside(nn.Linear):
    """Numbers that belong to a weight stand in an attribute of it, and in the module's state."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = self.weight.scale


def test_what_a_module_shows_beside_its_weights_counts() -> None:
    def scale(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.scale[3] += 1

    model, layer = helpers.tiny(), Beside(4, 4, bias=False)
    layer._parameters["weight"] = torch.zeros(4, 4).as_subclass(Marked)
    layer.weight.scale = torch.ones(4)
    model.model.layers[0].mlp.up_proj = layer
    assert changed(scale, model)


@pytest.mark.filterwarnings("ignore")  # of that package
def test_adapters_count_as_far_as_they_are_active(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(*names: str) -> Any:
        config = peft.LoraConfig(r=4, target_modules=["k_proj"], init_lora_weights=False)
        model = peft.get_peft_model(helpers.tiny(), config, adapter_name="first")
        for name in names:
            model.add_adapter(name, config)
        return model.eval()

    torch.manual_seed(0)
    one = adapted()
    torch.manual_seed(0)
    two = adapted("second")
    base = two.get_base_model()
    identity, alone = Identity(base), Identity(one.get_base_model())()
    assert identity() == alone  # another one that is not active changes nothing
    digests = {identity()}
    two.set_adapter("second")
    digests.add(identity())
    with two.disable_adapter(), one.disable_adapter():
        digests.add(identity())
        assert Identity(one.get_base_model())() == identity()
    two.set_adapter("first")
    assert identity() == alone
    layer = base.model.layers[0].self_attn.k_proj
    layer.scaling["first"] *= 3
    digests.add(identity())
    two.merge_adapter()
    digests.add(identity())
    assert len(digests) == 5
    with kvpress.attach(base, "full") as engine, torch.no_grad():
        base(helpers.prompt(1, 9))
        engine.cache.save(tmp_path / "cache")
        two.unmerge_adapter()
        with pytest.raises(CacheFileError, match="same adapters active"):
            engine.load_cache(tmp_path / "cache")


def test_neither_model_nor_weights_are_kept_alive() -> None:
    model = helpers.tiny()
    identity = Identity(model)
    identity()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    with pytest.raises(CacheError, match="engine that made this cache is gone"):
        identity()
