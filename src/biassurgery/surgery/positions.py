"""Letting a model count its tokens from a later position than 0, and from the first real one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from biassurgery.errors import AlreadyPatched
from biassurgery.surgery.swap import Edit, Swapped, host_class, on_top, set_class, swapped_class

NAME = "position_shift"


class ShiftEdit(Edit):
    """Adds a constant to the positions that a rotary or learned embedding of positions is given.

    Args:
        by: what is added.
        argument: the name and the place, in the embedding's forward, of the positions.
    """

    def __init__(self, by: int, argument: tuple[str, int]) -> None:
        super().__init__()
        self.by = by
        self.argument, self.place = argument

    def attach(self, module: nn.Module) -> None:
        if isinstance(module, Shifted):
            raise AlreadyPatched(
                "mode: the positions of this model are shifted already; unpatch_model(model,"
                " 'transplant') first."
            )
        set_class(module, swapped_class(type(module), Shifted))
        module.add_module(NAME, self)

    def detach(self, module: nn.Module) -> None:
        if isinstance(module, Shifted) and on_top(module) and module._modules[NAME] is self:
            set_class(module, host_class(module))
            del module._modules[NAME]


class Shifted(Swapped):
    """Mixed in front of an embedding of positions."""

    position_shift: ShiftEdit

    def edits(self) -> Iterator[Edit]:
        yield self.position_shift

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shift = self.position_shift
        if shift.argument in kwargs:
            kwargs[shift.argument] = kwargs[shift.argument] + shift.by
        else:
            args = (*args[: shift.place], args[shift.place] + shift.by, *args[shift.place + 1 :])
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class CountEdit(Edit):
    """Makes the body of a model count positions from the first real token of each row, where it is
    given a mask but no positions.

    Rotary models count padding too, which does not matter among tokens, but does to a key that
    stands at a position of its own.
    """

    def attach(self, module: nn.Module) -> None:
        self.names = list(inspect.signature(module.forward).parameters)
        set_class(module, swapped_class(type(module), Counted))
        module.add_module(NAME, self)

    def detach(self, module: nn.Module) -> None:
        if isinstance(module, Counted) and on_top(module) and module._modules[NAME] is self:
            set_class(module, host_class(module))
            del module._modules[NAME]


class Counted(Swapped):
    """Mixed in front of the body of a model."""

    position_shift: CountEdit

    def edits(self) -> Iterator[Edit]:
        yield self.position_shift

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = self.position_shift.names
        given = {**dict(zip(names, args)), **kwargs}
        mask = given.get("attention_mask")
        read = given.get("input_ids")
        read = given.get("inputs_embeds") if read is None else read
        if (
            given.get("position_ids") is None
            and isinstance(mask, Tensor)
            and mask.dim() == 2
            and read is not None
        ):
            given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -read.shape[1] :]
            return super().forward(**given)  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]
