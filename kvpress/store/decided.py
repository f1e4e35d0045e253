"""How old slots of each sequence are stored: in which channels, and each row in which format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kvpress import host
from kvpress.errors import CacheError
from kvpress.formulas.page_layout import PageLayout
from kvpress.store.saved import expect


class Decided:
    """What is decided of `sequences × heads` rows; at first nothing is.

    The channels (int16 `[R, C]` and `[R, U]`) are on the device, the rest is on the host.
    """

    def __init__(self, sequences: int, heads: int, device: torch.device) -> None:
        self.heads = heads
        nothing = torch.empty(0, 0, dtype=torch.int16, device=device)
        self.key_channels_RC = self.value_channels_RU = nothing  # until something is
        self.format_R = host.zeros(sequences * heads, dtype=torch.uint8)  # numbers of layouts
        self.decided_B = host.zeros(sequences, dtype=torch.bool)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that this keeps alive."""
        yield from (self.key_channels_RC, self.value_channels_RU, self.format_R, self.decided_B)

    @property
    def decided_R(self) -> Tensor:
        """Whether it is decided how old slots of a row are stored: bool, on the host."""
        return self.decided_B.repeat_interleave(self.heads)

    def make_room(self, layout: PageLayout) -> None:
        """Makes room for the channels of every row."""
        rows, device = len(self.format_R), self.key_channels_RC.device
        channels = torch.zeros(rows, layout.key_kept, dtype=torch.int16, device=device)
        self.key_channels_RC = channels
        self.value_channels_RU = channels.new_zeros(rows, layout.value_kept)

    def settle(
        self,
        sequences: Sequence[int],
        row_R: Tensor,
        key_channels_bHC: Tensor,
        value_channels_bHU: Tensor,
        format_bH: Tensor,
    ) -> None:
        """Decides for some sequences, whose rows these are."""
        on_device = row_R.to(self.key_channels_RC.device)
        self.key_channels_RC[on_device] = key_channels_bHC.flatten(0, 1).to(torch.int16)
        self.value_channels_RU[on_device] = value_channels_bHU.flatten(0, 1).to(torch.int16)
        self.format_R[row_R] = format_bH.flatten().to(torch.uint8)
        self.decided_B[list(sequences)] = True

    def select(self, index: Sequence[int], row_R: Tensor) -> Decided:
        """What is decided of some sequences, whose rows these are."""
        device = self.key_channels_RC.device
        chosen, on_device = Decided(0, self.heads, device), row_R.to(device)
        chosen.format_R, chosen.decided_B = self.format_R[row_R], self.decided_B[list(index)]
        chosen.key_channels_RC = self.key_channels_RC
        chosen.value_channels_RU = self.value_channels_RU
        if len(self.key_channels_RC):
            chosen.key_channels_RC = self.key_channels_RC[on_device]
            chosen.value_channels_RU = self.value_channels_RU[on_device]
        return chosen

    def state(self) -> dict[str, Tensor]:
        """Copies of everything, on the host."""
        return {
            "format": self.format_R.clone(),
            "decided": self.decided_B.clone(),
            "key_channels": self.key_channels_RC.cpu().clone(),
            "value_channels": self.value_channels_RU.cpu().clone(),
        }

    def check(self, state: Mapping[str, Tensor], layouts: Sequence[PageLayout]) -> None:
        """Raises CacheError unless `state` can have given this for these rows and layouts."""
        every, layout = len(self.format_R), layouts[0]
        known = any(x.numel() for name, x in state.items() if name.endswith("_channels"))
        sizes = ((every, layout.key_kept), (every, layout.value_kept)) if known else ((0, 0),) * 2
        expect(
            state,
            {
                "format": (torch.uint8, (every,)),
                "decided": (torch.bool, (len(self.decided_B),)),
                "key_channels": (torch.int16, sizes[0]),
                "value_channels": (torch.int16, sizes[1]),
            },
        )
        decided_R = state["decided"].repeat_interleave(self.heads)
        if bool((state["format"] > decided_R * (len(layouts) - 1)).any()):
            raise CacheError("Rows are in formats that nothing decided.")
        if bool(decided_R.any()) and not known:
            raise CacheError("It was decided how old slots are stored, but not in which channels.")
        for name, width in (("key", layout.key_width), ("value", layout.value_width)):
            kept_RC = state[f"{name}_channels"]
            kept_RC = kept_RC[decided_R].int() if known else kept_RC
            inside = (kept_RC >= 0) & (kept_RC < width)
            runs = (kept_RC[:, :width], kept_RC[:, width:])  # all, then those that have two codes
            ascend = all(bool((run_RC.diff(dim=1) > 0).all()) for run_RC in runs)
            if not bool(inside.all()) or not ascend:
                raise CacheError(
                    f"The channels of {name}s are not ascending numbers below {width}."
                )


def kept_of(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many channels of keys and values rows keep in a state; 0: that is not decided."""
    key, value = (state.get(f"{name}_channels") for name in ("key", "value"))
    return _width(key), _width(value)


def _width(channels: Tensor | None) -> int:
    return channels.shape[1] if channels is not None and channels.dim() == 2 else 0
