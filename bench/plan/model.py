"""A model without its weights: its shape, and what they would take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from kvpress.bench.common.models import Source
from transformers import AutoModelForCausalLM

from kvpress.engine import PAGE_SLOTS
from kvpress.hf.planning import process_bytes, shape_of, weight_bytes
from kvpress.hf.support import check_model
from kvpress.pipe.plan.demand import Shape


class Described(NamedTuple):
    """A model that is not loaded. weights: their bytes. process: what is there besides."""

    config: Any
    shape: Shape
    weights: int
    process: int


def described(source: Source) -> Described:
    """The config, the model in numbers, and what is there before the first token.

    On a CPU the process is part of that. Raises ModelError, and what `attach`
    raises of models.
    """
    config = source.config()
    maker: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = maker.from_config(config, dtype=getattr(torch, source.dtype_name))
    shape = shape_of(model, check_model(model), PAGE_SLOTS, None)
    shape = shape._replace(name=source.name)
    return Described(config, shape, weight_bytes(model), _process(source))


def _process(source: Source) -> int:
    """What is there besides weights: on a CPU the process."""
    on_gpu = torch.cuda.is_available() if source.device is None else source.device != "cpu"
    return 0 if on_gpu else process_bytes()
