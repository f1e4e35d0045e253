"""Columns that every step writes, held row by row while the pages of the rows are shared.

A mass changes in all slots with each decoded token. Were it left in the pages, the first token
after a fork would copy the whole prompt for every beam.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Overlay:
    """Dense columns `[R, S]`; what stands beyond a row's count is arbitrary."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = dict(columns)

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def rows(self, name: str, row_R: Tensor, slots: int) -> Tensor:
        """The first slots of some rows: `[r, slots]`, a copy."""
        column_RS = self.columns[name]
        return column_RS[row_R.to(column_RS.device), :slots]

    def select(self, row_R: Tensor) -> Overlay:
        """The columns of some rows."""
        chosen = {name: x[row_R.to(x.device)] for name, x in self.columns.items()}
        return Overlay(chosen)

    def write(self, name: str, row_R: Tensor, slot_RQ: Tensor, values_RQ: Tensor) -> None:
        """Sets slots of some rows; the columns grow as far as they must."""
        column_RS = self.columns[name]
        missing = (int(slot_RQ.max()) + 1 if slot_RQ.numel() else 0) - column_RS.shape[1]
        if missing > 0:
            column_RS = torch.nn.functional.pad(column_RS, (0, missing))
        device = column_RS.device
        column_RS[row_R.to(device)[:, None], slot_RQ.to(device)] = values_RQ.to(column_RS.dtype)
        self.columns[name] = column_RS

    def move(self, row_A: Tensor, source_A: Tensor, target_A: Tensor) -> None:
        """Copies one slot of each of some rows onto another one."""
        for column_RS in self.columns.values():
            row, start, to = (x.to(column_RS.device) for x in (row_A, source_A, target_A))
            column_RS[row, to] = column_RS[row, start]
