"""Letting a model count its tokens from a later position than 0, and from the first real one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from biassurgery.surgery.edit import Edit
from biassurgery.surgery.swap import Swapped


class Shifted(Swapped):
    """Mixed in front of an embedding of positions."""

    position_shift: ShiftEdit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shift = self.position_shift
        if shift.argument in kwargs:
            kwargs[shift.argument] = kwargs[shift.argument] + shift.by
        else:
            args = (*args[: shift.place], args[shift.place] + shift.by, *args[shift.place + 1 :])
        return super().forward(*args, **kwargs)


class ShiftEdit(Edit):
    """Adds a constant to the positions that a rotary or learned embedding of positions is given.

    Args:
        by: what is added.
        argument: the name and the place, in the embedding's forward, of the positions.
    """

    child = "position_shift"
    mixin = Shifted

    def __init__(self, by: int, argument: tuple[str, int]) -> None:
        super().__init__()
        self.by = by
        self.argument, self.place = argument


class Counted(Swapped):
    """Mixed in front of the body of a model."""

    keeps_signature = True
    position_count: CountEdit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.position_count.names, args)), **kwargs}
        mask = given.get("attention_mask")
        read = given.get(self.position_count.ids)
        read = given.get("inputs_embeds") if read is None else read
        if (
            given.get("position_ids") is None
            and isinstance(mask, Tensor)
            and mask.dim() == 2
            and read is not None
        ):
            given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -read.shape[1] :]
            return super().forward(**given)
        return super().forward(*args, **kwargs)


class CountEdit(Edit):
    """Makes the body of a model count positions from the first real token of each row.

    It does so where the body is given a mask but no positions. Rotary models count padding too,
    which does not matter among tokens, but does to a key that stands at a position of its own.

    Args:
        names: of the arguments of the body's forward, in order.
        ids: which of them are the token ids.
    """

    child = "position_count"
    mixin = Counted

    def __init__(self, names: list[str], ids: str = "input_ids") -> None:
        super().__init__()
        self.names = names
        self.ids = ids
