"""Letting a model count its tokens from a later position than 0, and from the first real one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biassurgery.surgery.edit import Edit
from biassurgery.surgery.own_columns import own_columns
from biassurgery.surgery.swap import Swapped


class Shifted(Swapped):
    """Mixed in front of an embedding of positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for edit in self.children_of(PositionEdit):
            if edit.argument in kwargs:
                kwargs[edit.argument] = edit(kwargs[edit.argument])
            else:
                args = (*args[: edit.place], edit(args[edit.place]), *args[edit.place + 1 :])
        return super().forward(*args, **kwargs)


class PositionEdit(Edit):
    """Changes or watches the positions that a rotary or learned embedding of them is given.

    Args:
        argument: the name and the place, in the embedding's forward, of the positions.
    """

    mixin = Shifted

    def __init__(self, argument: tuple[str, int]) -> None:
        super().__init__()
        self.argument, self.place = argument

    def forward(self, positions: Tensor) -> Tensor:
        """The positions (..., T), changed; the tensor that is given must stay as it is."""
        raise NotImplementedError  # abstract


class ShiftEdit(PositionEdit):
    """Adds a constant to the positions.

    Args:
        by: what is added.
        argument: as in `PositionEdit`.
    """

    child = "position_shift"

    def __init__(self, by: int, argument: tuple[str, int]) -> None:
        super().__init__(argument)
        self.by = by

    def forward(self, positions: Tensor) -> Tensor:
        return positions + self.by


class Counted(Swapped):
    """Mixed in front of a module that makes positions where it is given none."""

    keeps_signature = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        count = self.children_of(CountEdit)[0]  # others on the same module count alike
        given = {**dict(zip(count.names, args)), **kwargs}
        mask = given.get("attention_mask")
        read = given.get(count.ids)
        read = given.get("inputs_embeds") if read is None else read
        if (
            given.get("position_ids") is None
            and isinstance(mask, Tensor)
            and mask.dim() == 2
            and read is not None
        ):
            counted = (mask.long().cumsum(1) - 1).clamp(min=0)
            own = own_columns(counted, read.shape[1], given)
            given["position_ids"] = own + count.first
            return super().forward(**given)
        return super().forward(*args, **kwargs)


class CountEdit(Edit):
    """Makes a module count positions from the first real token of each row.

    It does so where the module is given a mask but no positions. Rotary models count padding too,
    which does not matter among tokens, but does to a key that stands at a position of its own.

    Args:
        names: of the arguments of the module's forward, in order.
        ids: which of them are the token ids.
        first: the position that the model gives to a sequence's first token.
    """

    child = "position_count"
    several = True
    mixin = Counted

    def __init__(self, names: list[str], ids: str = "input_ids", first: int = 0) -> None:
        super().__init__()
        self.names = names
        self.ids = ids
        self.first = first
