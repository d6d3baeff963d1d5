"""Being told when a model starts and ends a forward, and with which arguments."""

from __future__ import annotations

import inspect
from typing import Any

from biassurgery.surgery.edit import Edit
from biassurgery.surgery.swap import Swapped


class WatchedModel(Swapped):
    """Mixed in front of the class of a model, or of its body."""

    keeps_signature = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        edits = self.children_of(ModelEdit)
        names = inspect.signature(self.forward).parameters
        arguments = {**dict(zip(names, args)), **kwargs}
        begun: list[ModelEdit] = []
        try:
            for edit in edits:
                edit.enter(arguments)
                begun.append(edit)
            return super().forward(*args, **kwargs)
        finally:
            for edit in reversed(begun):
                edit.leave()


class ModelEdit(Edit):
    """Watches the forwards of a model and changes nothing."""

    child = "model_edit"
    several = True
    mixin = WatchedModel

    def enter(self, arguments: dict[str, Any]) -> None:
        """A forward begins: its arguments by name.

        Those by keyword also where a decorator renames them for the function.
        """

    def leave(self) -> None:
        """A forward that was entered is over, also by an exception."""
