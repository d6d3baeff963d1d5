"""Letting a model count its tokens from a later position than 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from biassurgery.errors import AlreadyPatched
from biassurgery.swapping import Edit, Swapped, host_class, on_top, set_class, swapped_class

NAME = "position_shift"


class ShiftEdit(Edit):
    """Adds a constant to the positions that a rotary or learned embedding of positions is given.

    Args:
        by: what is added.
        argument: the name and the place, in the embedding's forward, of the positions.
    """

    def __init__(self, by: int, argument: tuple[str, int]) -> None:
        super().__init__()
        self.by, (self.argument, self.place) = by, argument

    def attach(self, module: nn.Module) -> None:
        if isinstance(module, Shifted):
            raise AlreadyPatched("mode: the positions of this model are shifted already; unpatch_model(model, 'transplant') first.")
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
