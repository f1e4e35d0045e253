"""The transformers model inside what users hold, and the text model inside one of several."""

from __future__ import annotations

from typing import Any

import torch

from kvpress.errors import AttachError, UnsupportedModelError


def unwrap(model: Any) -> Any:
    """The innermost model that an engine can be attached to, or what was given.

    Raises AttachError for wrappers that run copies of the model, UnsupportedModelError for adapters
    that put keys and values of their own into the cache.
    """
    inner = _inner(model)
    return model if inner is None else unwrap(inner)


def _inner(model: Any) -> Any:
    """What a wrapper holds; None if it is none."""
    if not isinstance(model, torch.nn.Module):  # a pipeline
        held = getattr(model, "model", None)
        return held if isinstance(held, torch.nn.Module) and callable(model) else None
    if isinstance(model, torch.nn.DataParallel) and len(model.device_ids) > 1:
        raise AttachError(
            "DataParallel runs copies of the model on several devices, and a cache belongs to one."
            " Attach to the model inside, model.module, and call that."
        )
    if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        return model.module
    compiled = getattr(model, "_orig_mod", None)
    if compiled is not None:
        return compiled
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return None
    active = getattr(model, "active_peft_config", None)
    if getattr(active, "is_prompt_learning", False):
        raise UnsupportedModelError(
            f"The adapter {type(active).__name__} puts keys and values of its own into the cache,"
            " which this engine does not support. Use one that changes weights, such as LoRA.",
            "adapters that learn a prompt",
        )
    base: torch.nn.Module = model.get_base_model()  # type: ignore[operator]
    return base


def set_implementation(model: Any, name: str, text: str) -> None:
    """Sets what a model asks for its masks, and what its text model asks for its attention.

    Models of images or sound inside keep theirs.
    """
    if text_model(model) is model:
        model.set_attn_implementation(name)
        return
    own = model.config.get_text_config(decoder=True)
    keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is own]
    model.set_attn_implementation({"": name, **dict.fromkeys(keys, text)})


def text_model(model: Any) -> Any:
    """The decoder of a model with several inside (text with images or sound); else the model.

    None: it has none that can be told from the others.
    """
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        return model
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if getattr(decoder, "config", None) is text else None
