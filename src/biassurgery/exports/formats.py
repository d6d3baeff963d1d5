"""What every format of `export` is: a class that registers itself by being defined."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption
from biassurgery.findings.key_values import KeyValues
from biassurgery.kinds import Kinds
from biassurgery.modes import Mode, Transplant
from biassurgery.patching import patches

FORMATS: Kinds[Format] = Kinds("format", "name")


class Format(ABC):
    """One way to write what a patch does so that other libraries run it.

    Attributes:
        name: what `export(..., format=...)` knows it by.
        text_only: whether it is of models of text alone.
        reads_weights: whether it writes weights of the model, which then have to be whole.
    """

    name: ClassVar[str]
    text_only: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        FORMATS.add(cls)

    @abstractmethod
    def write(self, host: Host, folder: Path, key_values: KeyValues | None) -> None:
        """Write the files into a folder that is there, and that goes again where this raises."""


def applied_mode(model: nn.Module, name: str, format: str, advice: str) -> Mode:
    """The one patch that a format writes; others would be lost.

    Raises:
        BadOption: it is not on the model, or another one is, too.
    """
    applied = [patch.mode for patch in patches(model)]
    others = sorted({mode.name for mode in applied if mode.name != name})
    if others:
        raise BadOption(
            f"model: {', '.join(others)} is on it, which format={format!r} does not hold;"
            f" unpatch_model(model, {others[0]!r}) first."
        )
    if len(applied) != 1:
        raise BadOption(f"model: {name!r} is on it {len(applied)} times; {advice}.")
    return applied[0]


def key_values_of(host: Host, given: KeyValues | None, format: str) -> KeyValues:
    """The key values that were given, or those of the transplant on the model."""
    if given is not None:
        if not isinstance(given, KeyValues):
            raise BadOption(
                f"key_values: {type(given).__name__}; pass what calibrate_key_values(model,"
                " batches) returned."
            )
        given.check()
        return given
    advice = (
        "patch_model(model, 'transplant', key_values=...), or give key_values= of"
        " calibrate_key_values(model, batches)"
    )
    mode = applied_mode(host.root, Transplant.name, format, advice)
    assert isinstance(mode, Transplant)
    return mode.key_values
