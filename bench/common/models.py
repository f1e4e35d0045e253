"""Models and tokenizers: where they come from and how they are loaded.

Nothing here loads torch before a model is wanted.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpress.bench.common.loading import ModelError as ModelError
from kvpress.bench.common.loading import quiet

DEMO = "demo"
DEMO_NAME = "SmolLM2-135M-Instruct"
AUTO = "auto"
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Source:
    """Which model, and how it is loaded.

    name: `demo`, a Hugging Face id, or a path. dtype: `auto` is the checkpoint's; None is float32
    on the CPU and `auto` elsewhere. device: None is a GPU if there is one. device_map: instead of a
    device, what accelerate takes, as a word or as JSON. revision: branch, tag or commit of the hub.
    trust_remote_code: whether Python code that comes with the checkpoint may run. tp: among how
    many processes the heads are divided.
    """

    name: str = DEMO
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    tp: int | None = None

    @property
    def load_options(self) -> dict[str, Any]:
        """What a record says of loading besides name and dtype: what was asked for."""
        names = ("device_map", "revision", "trust_remote_code", "tp")
        return {name: value for name in names if (value := getattr(self, name))}

    @property
    def dtype_name(self) -> str:
        """The dtype of the weights, from the checkpoint's config where that decides."""
        known = self._dtype()
        if known != AUTO:
            return known
        text = self.config().get_text_config(decoder=True)
        return str(text.dtype or "float32").removeprefix("torch.")

    def config(self) -> Any:
        """The config of the model, of which nothing else is loaded. Raises ModelError."""
        from transformers import AutoConfig

        with self._loading():
            return AutoConfig.from_pretrained(self._place, **self.hub)

    def load(self) -> tuple[Any, Any]:
        """The model, in eval mode and on its device, and the tokenizer. Raises ModelError."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype, where = self._dtype(), self._where()
        with self._loading():
            tokenizer = AutoTokenizer.from_pretrained(self._place, **self.hub)
            model: Any = AutoModelForCausalLM.from_pretrained(
                self._place,
                dtype=dtype if dtype == AUTO else getattr(torch, dtype),
                **self._places(where),
                **self.hub,
            )
        return model.eval(), tokenizer

    def _places(self, where: Any) -> dict[str, Any]:
        """Onto which devices, or into which processes, `from_pretrained` reads weights."""
        if self.tp is None:
            return {"device_map": where}
        distributed: Any = importlib.import_module("transformers.distributed")
        return {"distributed_config": distributed.DistributedConfig(tp_size=self.tp)}

    @property
    def on_cpu(self) -> bool:
        """Whether weights are read onto the CPU. Raises ModelError."""
        return self._where() is None

    def _dtype(self) -> str:
        chosen = self.dtype
        if chosen is None:
            chosen = "float32" if self._where() is None else AUTO
        if chosen != AUTO and chosen not in DTYPES:
            raise ModelError(f"dtype={chosen!r} is unknown. Allowed: {', '.join((AUTO, *DTYPES))}.")
        return chosen

    def _where(self) -> Any:
        """What `from_pretrained` takes, so that weights are read onto their devices at once.

        None for the CPU. Raises ModelError.
        """
        import torch

        if self.device_map is not None:
            if self.device is not None:
                raise ModelError(
                    f"device={self.device!r} and device_map={self.device_map!r} were both given."
                    " Give one of them."
                )
            return _device_map(self.device_map)
        found = torch.cuda.is_available()
        try:
            device = torch.device(self.device or ("cuda" if found else "cpu"))
        except RuntimeError as error:
            raise ModelError(f"device={self.device!r} is unknown: {error}") from error
        if device.type == "cuda" and not found:
            raise ModelError(f"device={self.device!r}: torch sees no CUDA device. Give 'cpu'.")
        return None if device.type == "cpu" else {"": device}

    @property
    def _place(self) -> str:
        from kvpress.bench.common.demo import demo_folder

        place = str(demo_folder()) if self.name == DEMO else self.name
        if self.revision is not None and Path(place).is_dir():
            raise ModelError(
                f"revision={self.revision!r}: {self.name!r} is a folder, and only models of the hub"
                " have revisions. Leave it out, or give a Hugging Face id."
            )
        return place

    @property
    def hub(self) -> dict[str, Any]:
        """What `from_pretrained` takes besides."""
        # Without a value, transformers would ask on the terminal whether code may run.
        given = {} if self.revision is None else {"revision": self.revision}
        return {"trust_remote_code": self.trust_remote_code, **given}

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            with quiet():
                yield
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            advice = " Give 'demo', a Hugging Face id, or a folder that holds one."
            if "trust_remote_code" in str(error):
                advice = " If you trust that code, give --trust-remote-code."
            raise ModelError(
                f"The model {self.name!r} cannot be loaded: {error}{advice}"
            ) from error


def known_as(name: str) -> str:
    """The name of a model as others know it."""
    return f"{DEMO_NAME} ({DEMO})" if name == DEMO else name


def load(name: str, dtype: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    """The model and the tokenizer of a `Source`. Raises ModelError."""
    return Source(name, dtype, device).load()


def _device_map(given: str) -> Any:
    """A word, or a mapping of modules to devices. Raises ModelError."""
    if not given.startswith("{"):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise ModelError(f"device_map={given!r} is no JSON: {error}.") from error
