"""What every mode is.

A mode is a frozen dataclass that is known by being defined; a string is sugar for one of them. It
says which edits a patch consists of; it changes nothing itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from biassurgery.adapters.layers import Layers
from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption, UnknownMode
from biassurgery.findings.sites import Sites
from biassurgery.kinds import Kinds, path_of
from biassurgery.surgery.edit import Place

MODES: Kinds[Mode] = Kinds("mode", "name", UnknownMode)


@dataclass(frozen=True)
class Mode(ABC):
    """What a patch does. A subclass that sets `name` can be asked for by it.

    Attributes:
        name: what `patch_model(model, mode=...)` knows it by; a base class has none.
        needs_sites: whether sites are looked for where none are given.
        replaces_start: whether the model is to read sequences without their start token.
    """

    name: ClassVar[str]
    needs_sites: ClassVar[bool] = True
    replaces_start: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        MODES.add(cls)

    @property
    def freezes(self) -> bool:
        """Whether only the parameters that the patch adds are to be trained."""
        return False

    def classes(self) -> dict[str, type]:
        """Classes of other kinds that a saved patch needs again, by the option that names them."""
        return {}

    def is_same(self, other: object) -> bool:
        """Whether another mode is equal to this one.

        Also where the class was defined again meanwhile, as by a notebook's cell that is run twice.
        """
        if type(self) is type(other):
            return self == other
        if not isinstance(other, Mode) or path_of(type(self)) != path_of(type(other)):
            return False
        return self._compared() == other._compared()

    def _compared(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.compare}

    def check_no_sites(self, sites: Sites) -> None:
        """Raise `BadOption` if sites were given; for a mode that does not use any."""
        if len(sites):
            raise BadOption(f"sites: {self.name} does not use any; leave sites= out.")

    def resolved(self, host: Host) -> Mode:
        """The mode with what only the model can tell; it is asked before `places`."""
        return self

    @abstractmethod
    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        """The new edits. Raises before anything is changed if one cannot be made."""

    def used(self, host: Host, sites: Sites, layers: Layers) -> Sites:
        """The sites that a patch is made from, of those that are given."""
        return sites

    def options(self) -> dict[str, Any]:
        """The fields as JSON can hold them; what tensors say is saved with the edits."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def tensors(self) -> dict[str, Tensor]:
        """What else is to be saved, by name; `from_saved` gets it back."""
        return {}

    @classmethod
    def from_saved(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Mode:
        """The mode of saved options and tensors: its `tensors()`, its edits' by `layer.name`."""
        known = {field.name for field in fields(cls) if field.init}
        return cls(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in options.items()
                if name in known
            }
        )
