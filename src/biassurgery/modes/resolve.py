"""From a mode's name and its options to the mode."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from biassurgery.errors import BadOption
from biassurgery.modes.base import MODES, Mode


def resolve_mode(mode: str | Mode, options: dict[str, Any]) -> Mode:
    """The mode object that a string and its options stand for.

    Raises:
        UnknownMode: not a mode's name.
        BadOption: options that the mode does not have, options beside a mode object, or one whose
            class has no name.
    """
    if isinstance(mode, Mode):
        if options:
            raise BadOption(
                f"options: {sorted(options)} were given beside the mode object {mode}; set them on"
                " the object."
            )
        if getattr(mode, "name", None) is None:
            raise BadOption(
                f"mode: {type(mode).__qualname__} has no name; set one in its class, by which it"
                " can be removed and saved."
            )
        return mode
    kind = MODES.find(mode, ", or a mode object")
    known = {field.name: field for field in fields(kind) if field.init}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise BadOption(
            f"options: {kind.name} has no {', '.join(map(repr, unknown))}; it takes"
            f" {sorted(known) or 'none'}."
        )
    missing = [
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING and name not in options
    ]
    if missing:
        raise BadOption(
            f"options: {kind.name} needs {', '.join(f'{name}=' for name in missing)}; give it"
            " beside the mode."
        )
    return kind(**options)
