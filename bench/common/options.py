"""Options that commands share, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
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


DeviceMap = Annotated[
    str | None,
    _of_model(
        help="Instead of --device: auto, balanced, …, or JSON of modules to devices.",
        show_default="one device",
    ),
]


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
        """Where the model comes from. Raises BadParameter where --device has a cap."""
        place, cap = split_device(self.device)
        if cap is not None:
            raise typer.BadParameter(
                f"--device {self.device}: this command keeps its caches on one device, without a"
                " cap. Give cpu or cuda."
            )
        return self.source_at(place)

    def source_at(self, device: str | None) -> Source:
        """The same, onto a device."""
        own = {field.name for field in fields(self)}  # a device map is not among all of them
        names = [field.name for field in fields(Source)[1:] if field.name in own]
        given = {name: getattr(self, name) for name in names}
        return Source(self.model, **{**given, "device": device})


@dataclass(frozen=True, kw_only=True)
class ModelOptions(HubOptions):
    """The same, and over which devices it is spread."""

    device_map: DeviceMap = None


@dataclass(frozen=True, kw_only=True)
class TieredOptions(HubOptions):
    """The same, how many bytes keys and values may take there, and where the others go."""

    device_map: DeviceMap = None

    device: Annotated[
        str | None,
        _of_model(
            help="cpu, cuda, …: weights are loaded onto it. A size is the most that keys and"
            " values take there, what is more goes to --host and --disk: 512MiB, or both:"
            " cpu,512MiB.",
            show_default=GPU,
        ),
    ] = None
    host: Annotated[
        str | None,
        _of_model(
            help="The most bytes of the host's memory that keys and values take: 2GiB.",
            show_default="none",
        ),
    ] = None
    disk: Annotated[
        str | None,
        _of_model(
            help="The most bytes that they take on disk, and the folder: 20GiB:folder.",
            show_default="none",
        ),
    ] = None

    @property
    def source(self) -> Source:
        """Where the model comes from."""
        return self.source_at(split_device(self.device)[0])

    @property
    def caps(self) -> dict[str, Any]:
        """What `attach` takes; nothing without caps. Raises TierError for what it would refuse."""
        from kvpress.store.tiers.caps import Caps
        from kvpress.store.tiers.folder import check_folder

        caps = Caps.parse(**self.given_caps)
        if caps is not None and caps.disk is not None:
            check_folder(caps.disk.folder)
        return {} if caps is None else self.given_caps

    @property
    def given_caps(self) -> dict[str, str | None]:
        """The same as it was given, unchecked."""
        return {"device": split_device(self.device)[1], "host": self.host, "disk": self.disk}


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


def split_device(given: str | None) -> tuple[str | None, str | None]:
    """Where weights are and how many bytes pages may take there, of `cpu`, `512MiB`, `cpu,512MiB`.

    None for what is not said.
    """
    if given is None:
        return None, None
    place, comma, cap = (part.strip() for part in given.partition(","))
    if not comma and place[:1].isdigit():
        return None, place
    return place or None, cap if comma else None


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
