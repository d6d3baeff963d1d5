"""What every mode is, and the layers that a patch is asked for.

A mode is a frozen dataclass; a string is sugar for one of them. It says which edits a patch
consists of; it changes nothing itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from biassurgery.adapters.layers import Layers
from biassurgery.adapters.registry import Host
from biassurgery.findings.sites import Sites
from biassurgery.surgery.edit import Place


@dataclass(frozen=True)
class Mode(ABC):
    """What a patch does."""

    name: ClassVar[str]
    needs_sites: ClassVar[bool] = True

    @property
    def freezes(self) -> bool:
        """Whether only the parameters that the patch adds are to be trained."""
        return False

    @abstractmethod
    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        """The new edits. Raises before anything is changed if one cannot be made."""

    def options(self) -> dict[str, Any]:
        """The fields as JSON can hold them; what tensors say is saved with the edits."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def tensors(self) -> dict[str, Tensor]:
        """What else is to be saved, by name; `from_saved` gets it back."""
        return {}

    @classmethod
    def from_saved(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Mode:
        """The mode that `options`, its `tensors()` and those of its edits, by `layer.name`, were
        saved from.
        """
        known = {field.name for field in fields(cls)}
        return cls(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in options.items()
                if name in known
            }
        )
