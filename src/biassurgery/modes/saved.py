"""The classes of a saved patch: where they are from, and whether they are here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biassurgery.edits.bias import BIASES
from biassurgery.errors import BadOption, FileError, MissingPackage
from biassurgery.kinds import Kinds, path_of
from biassurgery.modes.base import MODES, Mode

KINDS: dict[str, Kinds[Any]] = {"mode": MODES, "kind": BIASES}
_OURS = __name__.partition(".")[0]


def modules_of(mode: Mode) -> dict[str, str]:
    """Where a saved patch's classes are defined: {"mode": ...}, and {"kind": ...} of a bias.

    Raises:
        BadOption: the name of the mode stands for another class, which would be loaded instead.
    """
    known = MODES.get(mode.name)
    if known is None or path_of(known) != path_of(type(mode)):
        raise BadOption(
            f"model: {mode} cannot be saved, for {mode.name!r} does not stand for its class"
            f" {path_of(type(mode))}; give that class a name of its own."
        )
    classes: dict[str, type] = {"mode": type(mode), **mode.classes()}
    return {argument: cls.__module__ for argument, cls in classes.items()}


def check_known(argument: str, name: str, module: str, folder: Path) -> None:
    """Raise if a mode or a kind of bias is not known here, or is that of another package.

    Nothing is imported for it but what is installed under `biassurgery.extensions`: a file does not
    say what is to be run. A module may have moved inside of its package, or out of a notebook.
    """
    known = KINDS[argument].get(name)
    package = module.partition(".")[0]
    if known is None and package == _OURS:
        raise FileError(
            f"folder: {folder} holds the {argument} {name!r}, which this version does not know;"
            " update biassurgery."
        )
    if known is None and package == "__main__":
        raise MissingPackage(
            f"folder: {folder} holds the {argument} {name!r}, which was defined in a script or a"
            " notebook; run its definition here, and load again."
        )
    if known is None:
        raise MissingPackage(
            f"folder: {folder} holds the {argument} {name!r} of the module {module}, which is"
            " neither imported nor installed as an extension of biassurgery; install the package"
            f" {package}, or import the module, and load again."
        )
    if package not in ("__main__", known.__module__.partition(".")[0]):
        raise FileError(
            f"folder: {folder} holds the {argument} {name!r} of the module {module}, but here that"
            f" name is of {path_of(known)}; load it where only the package {package} is known."
        )
