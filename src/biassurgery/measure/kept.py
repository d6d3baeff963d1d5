"""The few sequences that a pass keeps, to run them again under a patch of what it has found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from biassurgery.measure.growth import Large

_MOST = 4  # sequences
_LEAST = 2  # where a batch has so many: a patch that is on the model may need others, as `shuffle`
# arguments of a model that have one row a sequence, or one row for all
_BY_ROW = frozenset(
    (
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "labels",
        "pixel_values",
        "input_features",
    )
)


class Kept:
    """Of all batches, rows that hold most kinds of massive activations (layer, channel, role).

    Data may come from an iterable that can be read once, so what is to be run again is kept: copies
    of a few rows of one batch.

    Attributes:
        batch: the rows; None as long as there are none.
    """

    def __init__(self) -> None:
        self.batch: dict[str, Any] | None = None
        self._kinds = -1

    def offer(self, batch: Mapping[str, Any], outputs: Sequence[Large]) -> None:
        """Take rows of this batch if they hold more kinds than those that are kept."""
        rows, kinds = _covering(outputs)
        if kinds > self._kinds:
            self._kinds = kinds
            others = [row for row in range(_LEAST) if row not in rows]
            self.batch = rows_of(batch, rows + others[: max(0, _LEAST - len(rows))])

    def state(self) -> dict[str, Any]:
        """The rows, for a checkpoint."""
        return {"batch": self.batch, "kinds": self._kinds}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Hold the rows of such a state, on the model's device."""
        self._kinds = state["kinds"]
        self.batch = state["batch"]
        if self.batch is not None:
            self.batch = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in self.batch.items()
            }


def _covering(outputs: Sequence[Large]) -> tuple[list[int], int]:
    """Rows of a batch that hold many kinds of massive activations, and how many kinds they hold.

    Each is the one with most of the kinds that those before it do not have.
    """
    massive = [
        torch.stack([torch.full_like(x.row, x.layer), x.channel, x.role, x.row])[:, x.massive]
        for x in outputs
    ]
    rows: list[int] = []
    if not massive:
        return rows, 0
    places = torch.cat(massive, 1).unique(dim=1)
    kind = places[:3].unique(dim=1, return_inverse=True)[1]
    row = places[3]
    kinds = int(kind.max()) + 1 if len(kind) else 0
    while len(row) and len(rows) < _MOST:
        rows.append(int(row.bincount().argmax()))
        left = ~torch.isin(kind, kind[row == rows[-1]])
        kind, row = kind[left], row[left]
    return rows, kinds - len(kind.unique())


def rows_of(batch: Mapping[str, Any], rows: Iterable[int]) -> dict[str, Any]:
    """Copies of some rows of a batch; of all, where an argument may have no row a sequence."""
    axes = {name: _row_axis(name, value) for name, value in batch.items() if _has_rows(name, value)}
    sizes = {name: batch[name].shape[axis] for name, axis in axes.items()}
    count = max(sizes.values(), default=0)
    by_row = set(batch) <= _BY_ROW and all(size in (1, count) for size in sizes.values())
    there = torch.tensor([row for row in rows if row < count], dtype=torch.int64, device="cpu")
    chosen = dict(batch)
    for name, axis in axes.items():
        if by_row and sizes[name] > 1:
            chosen[name] = batch[name].index_select(axis, there.to(batch[name].device))
    return chosen


def _has_rows(name: str, value: Any) -> bool:
    """Whether an argument has an axis of rows: positions (T,) are those of all rows."""
    return isinstance(value, Tensor) and (name != "position_ids" or value.dim() > 1)


def _row_axis(name: str, value: Tensor) -> int:
    """Which axis that is: positions are (B, T) or (axes of an image, B, T)."""
    return value.dim() - 2 if name == "position_ids" else 0
