"""Options that every command has which loads a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Option(help="'demo', a Hugging Face id, or a path.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="auto (the checkpoint's), float32, float16 or bfloat16 (default: float32 on the CPU,"
        " elsewhere auto)."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, … (default: a GPU if there is one); loaded onto it.")
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="Instead of --device: auto, balanced, …, or JSON of modules to devices."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", min=1)]


def chosen_device(name: str | None) -> Any:
    """The torch.device of an option; without one a GPU if there is one. Raises BadParameter."""
    import torch

    found = torch.cuda.is_available()
    if name not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"--device {name} is unknown; allowed: cpu, cuda.")
    if name == "cuda" and not found:
        raise typer.BadParameter("--device cuda: torch sees no CUDA device; use --device cpu.")
    return torch.device(name or ("cuda" if found else "cpu"))
