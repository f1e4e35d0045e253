"""Options that commands share, and what follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from kvpress.bench.common.models import Source

if TYPE_CHECKING:
    from kvpress.bench.common.text import Text

_PANEL = "The model and where it runs"
GPU = "a GPU if there is one"
REFERENCE = "Python's language reference"
GIVEN = "--prompt"  # the name of a text that stands on the command line

Threads = Annotated[
    int | None, typer.Option(help="CPU threads.", show_default="torch's choice", min=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def _of_model(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PANEL, **more)


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Which model, and how it is loaded."""

    model: Annotated[str, _of_model(help="'demo', a Hugging Face id, or a path.")] = "demo"
    dtype: Annotated[
        str | None,
        _of_model(
            help="auto (the checkpoint's), float32, float16 or bfloat16.",
            show_default="float32 on the CPU, elsewhere auto",
        ),
    ] = None
    device: Annotated[
        str | None,
        _of_model(help="cpu, cuda, …: weights are loaded onto it.", show_default=GPU),
    ] = None
    revision: Annotated[
        str | None,
        _of_model(help="Branch, tag or commit of the hub.", show_default="the main branch"),
    ] = None
    trust_remote_code: Annotated[
        bool,
        _of_model("--trust-remote-code", help="Run Python code that comes with the checkpoint."),
    ] = False
    threads: Annotated[
        int | None, _of_model(help="CPU threads.", show_default="torch's choice", min=1)
    ] = None

    @property
    def source(self) -> Source:
        """Where the model comes from."""
        given = asdict(self)
        del given["threads"]
        return Source(given.pop("model"), **given)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(HubOptions):
    """The same, and over which devices it is spread."""

    device_map: Annotated[
        str | None,
        _of_model(
            help="Instead of --device: auto, balanced, …, or JSON of modules to devices.",
            show_default="one device",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What is asked of the model."""

    prompt: Annotated[
        str | None, typer.Option(help="The prompt itself.", show_default=REFERENCE)
    ] = None
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text file that is the prompt.", show_default="none")
    ] = None
    chat: Annotated[bool, typer.Option(help="Wrap prompts in the model's chat template.")] = True

    def given(self, batch_file: Path | None = None) -> Text | None:
        """The text of the prompts, None for the default one. Raises BadParameter or TextError."""
        from kvpress.bench.common.text import Text, read_text

        files = {"--prompt-file": self.prompt_file, "--batch-file": batch_file}
        if sum(source is not None for source in (self.prompt, *files.values())) > 1:
            raise typer.BadParameter(f"give only one of {GIVEN}, {', '.join(files)}")
        if self.prompt is not None:
            return Text(GIVEN, self.prompt)
        path = self.prompt_file or batch_file
        return None if path is None else read_text(path)


def use_threads(threads: int | None) -> None:
    """Makes torch use so many CPU threads; as many as it likes without a number."""
    import torch

    if threads:
        torch.set_num_threads(threads)


def chosen_device(name: str | None) -> Any:
    """The torch.device of an option; without one a GPU if there is one. Raises BadParameter."""
    import torch

    found = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"--device {name} is unknown; allowed: cpu, cuda.")
    if name == "cuda" and not found:
        raise typer.BadParameter("--device cuda: torch sees no CUDA device; use --device cpu.")
    return torch.device(name or ("cuda" if found else "cpu"))
