"""The defaults of the process, which belong to the user, change no result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers
import kvpress.csrc
import kvpress.policies
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import kvpress

RECIPES = [
    *helpers.recipes().values(),
    "snapkv",
    "sale:threshold=0.01,least=16",
    "d2o:budget=0.4,count_bias=true,merge_keys=unrotated,mode=official_code,full_first=0,full_last=0",
    "keyformer:budget=40KiB,normalise_age=true,window=16",
    "think:pairs=true,value_keep=0.5,recent=4,window=8+quant:residual=4,guard=0.1",
    "think:method=forward_selection,recent=4,window=8",
    "keyformer:budget=0.5+think:recent=4,window=8+quant:residual=4",
    "tova:budget=0.5,interval=3+quant:residual=4",
]
OWN = tuple(str(Path(m.__path__[0]).resolve()) for m in (kvpress, kvpress.policies, kvpress.csrc))
SAYS = {Tensor.float, Tensor.double, Tensor.half, Tensor.to, Tensor.view}


class Promotions(TorchFunctionMode):
    """Notes where the engine lets whole numbers become floats of whatever the default dtype is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and function not in SAYS:
            leaves = tree_leaves((args, kwargs))
            named = any(isinstance(x, torch.dtype) for x in leaves)
            floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in leaves)
            frame = sys._getframe(1)
            if not named and not floats and frame.f_code.co_filename.startswith(OWN):
                self.found.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return out


@contextmanager
def defaults(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


IDS, MASK = helpers.padded([90, 61], "left")
STEP, MORE = torch.tensor([[5], [7]]), helpers.prompt(2, 40)


def tell(model: Any, recipe: str, path: Path) -> list[Any]:
    """What a policy gives in prompts with padding, chunks, steps, beams, drafts, forks, files."""
    logits = []

    def feed(tokens: Tensor, cache: Any) -> None:
        seen = cache.columns_seen
        ones = torch.ones_like(IDS[:, :1]).expand(-1, seen + tokens.shape[1] - 90)
        mask = torch.cat([MASK if seen < 93 else MASK[[1, 1]], ones], 1)
        position = (mask.cumsum(1) - 1).clamp_min(0)[:, seen:]
        out = model(tokens, attention_mask=mask, position_ids=position, past_key_values=cache)
        logits.append(out.logits)

    with kvpress.attach(model, recipe) as engine:
        cache = engine.new_cache(max_new_tokens=9)
        for tokens in (IDS, STEP, STEP, STEP):
            feed(tokens, cache)
        cache.reorder_cache(torch.tensor([1, 1], device="cpu"))
        for tokens in (MORE, STEP):
            feed(tokens, cache)
        cache.activate_past_recording()
        feed(MORE[:, :4], cache)
        cache.crop(-2)
        cache.stop_past_recording()
        feed(STEP, cache)
        fork = cache.fork()
        cache.save(path)
        for one in (fork, engine.load_cache(path)):
            feed(STEP, one)
            feed(STEP, one)
        report = engine.report(cache).to_dict() | {"stages": None}
        return [*logits, report, helpers.positions(fork), cache.check_integrity()]


def same(given: list[Any], wanted: list[Any]) -> bool:
    pairs = zip(given, wanted, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_default_dtypes_change_nothing(recipe: str, tmp_path: Path) -> None:
    model = helpers.tiny("llama")
    with torch.no_grad():
        wanted = tell(model, recipe, tmp_path / "cache")
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            with defaults(dtype):
                assert same(tell(model, recipe, tmp_path / "cache"), wanted), dtype


@pytest.mark.parametrize("recipe", RECIPES)
def test_default_devices_change_nothing(recipe: str, tmp_path: Path) -> None:
    model = helpers.tiny("llama")
    with torch.no_grad():
        wanted = tell(model, recipe, tmp_path / "cache")
        with defaults(device="meta"):
            assert same(tell(model, recipe, tmp_path / "cache"), wanted)


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_numbers_become_floats_of_a_named_dtype(recipe: str, tmp_path: Path) -> None:
    model = helpers.tiny("llama")
    with torch.no_grad(), Promotions() as promotions:
        tell(model, recipe, tmp_path / "cache")
    assert not promotions.found
