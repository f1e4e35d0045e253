"""Options of commands whose work several processes share, each with the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from kvpress.bench.common.ranks import ParallelOptions, refuse_idle_processes, started_by_torchrun

_PANEL = "The model and where it runs"


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How many actors of Ray share a benchmark."""

    ray: Annotated[
        int | None,
        typer.Option(
            help="Actors of Ray that share the sizes (--tokens, --batch), each with the model. For"
            " a GPU per actor, or several nodes: on cores of one machine their timings disturb"
            " each other.",
            rich_help_panel=_PANEL,
            show_default="none",
            min=1,
        ),
    ] = None

    def over(self, parts: ParallelOptions) -> int | None:
        """The number of actors. Raises BadParameter for what does not go together with --ray."""
        if self.ray is None:
            return None
        if parts.tp is not None:
            raise typer.BadParameter(
                f"--ray {self.ray} with --tp {parts.tp}: each actor holds the whole model. Give one"
                " of them: --tp for a model that does not fit one device, --ray for more of them."
            )
        refuse_idle_processes("--ray starts its actors itself: run the command without torchrun.")
        return self.ray


@dataclass(frozen=True, kw_only=True)
class ShardOptions(RayOptions):
    """How many actors of Ray, or processes of torchrun, share an evaluation."""

    ray: Annotated[
        int | None,
        typer.Option(
            help="Actors of Ray that share the contexts, each with the whole model and, where there"
            " are GPUs, one of its own; in the cluster of RAY_ADDRESS, or here.",
            rich_help_panel=_PANEL,
            show_default="none",
            min=1,
        ),
    ] = None
    shards: Annotated[
        int | None,
        typer.Option(
            help="Processes that share the contexts, each with the whole model: start as many, with"
            " torchrun --nproc-per-node N -m kvpress.",
            rich_help_panel=_PANEL,
            show_default="one",
            min=1,
        ),
    ] = None

    @property
    def shared(self) -> bool:
        """Whether there may be more processes than this one."""
        return self.ray is not None or self.shards is not None

    def check(self, parts: ParallelOptions, device_map: str | None) -> None:
        """Raises BadParameter for what does not go together."""
        if self.shards is None:
            self.over(parts)
            return
        for name, value in {"ray": self.ray, "tp": parts.tp, "device-map": device_map}.items():
            if value is not None:
                raise typer.BadParameter(
                    f"--shards {self.shards} with --{name} {value}: each process holds the whole"
                    " model on one device. Give one of the two."
                )
        if not started_by_torchrun():
            raise typer.BadParameter(
                f"--shards {self.shards}, but this process was started alone. Start as many:"
                f" torchrun --nproc-per-node {self.shards} -m kvpress ..., or leave it out."
            )
