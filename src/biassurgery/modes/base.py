"""What every mode is, and the layers that a patch is asked for.

A mode is a frozen dataclass; a string is sugar for one of them. It says which edits a patch consists of; it changes nothing itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption, LayerOutOfRange
from biassurgery.sites import Sites
from biassurgery.swapping import Edit

Layers = Literal["first", "all"] | int | Sequence[int] | None


class Place(NamedTuple):
    """One edit, the module that it goes to, and the layer that this belongs to; None: to the model as a whole."""

    layer: int | None
    module: nn.Module
    edit: Edit


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
        """The mode that `options`, its `tensors()` and those of its edits, by `layer.name`, were saved from."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items() if name in known})


def layer_indices(host: Host, layers: int | Sequence[int]) -> list[int]:
    """Layers given by index, ascending.

    Raises:
        BadOption, LayerOutOfRange: not indices of this model.
    """
    chosen = integers("layers", layers, "use 'first', 'all' or one or more indices")
    for layer in chosen:
        if not 0 <= layer < len(host.blocks):
            raise LayerOutOfRange(f"layers: {layer} is outside the model's blocks 0 to {len(host.blocks) - 1}.")
    return sorted(set(chosen))


def all_or_indices(host: Host, layers: Layers, kind: str) -> list[int] | None:
    """The layers of a mode that by default changes all of them, which None stands for."""
    if layers is None or layers == "all":
        return None
    if isinstance(layers, str):
        raise BadOption(f"layers: {layers!r}; modes on {kind} take 'all' or indices.")
    return layer_indices(host, layers)


def block_dtype(block: nn.Module) -> torch.dtype:
    """The floating dtype that a block computes in; quantised weights do not count."""
    return next((p.dtype for p in block.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1), torch.float32)


def integers(argument: str, given: Any, advice: str) -> tuple[int, ...]:
    """One integer, or one or more of them, as a tuple."""
    several = tuple(given) if isinstance(given, Iterable) else (given,)
    if not several or any(not isinstance(i, Integral) or isinstance(i, bool) for i in several):
        raise BadOption(f"{argument}: {given!r}; {advice}.")
    return tuple(map(int, several))
