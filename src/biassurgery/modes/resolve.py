"""The names of the modes."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from biassurgery.errors import BadOption, UnknownMode
from biassurgery.modes.added_token import TestTimeRegisters
from biassurgery.modes.attention import AttentionBias, Instrument, Transplant
from biassurgery.modes.base import Mode
from biassurgery.modes.massive import Noise, SetMean, SetValue, SetZero, Shuffle, ZeroRandom
from biassurgery.modes.registers import FixRegisters

MODES: dict[str, type[Mode]] = {
    mode.name: mode
    for mode in (
        SetMean,
        SetZero,
        SetValue,
        Noise,
        Shuffle,
        ZeroRandom,
        Instrument,
        AttentionBias,
        Transplant,
        FixRegisters,
        TestTimeRegisters,
    )
}


def resolve_mode(mode: str | Mode, options: dict[str, Any]) -> Mode:
    """The mode object that a string and its options stand for.

    Raises:
        UnknownMode: not a mode's name.
        BadOption: options that the mode does not have, or options beside a mode object.
    """
    if isinstance(mode, Mode):
        if options:
            raise BadOption(
                f"options: {sorted(options)} were given beside the mode object {mode}; set them on"
                " the object."
            )
        return mode
    kind = MODES.get(mode) if isinstance(mode, str) else None
    if kind is None:
        raise UnknownMode(
            f"mode: {mode!r} is not known; use one of {', '.join(map(repr, MODES))}, or a mode"
            " object."
        )
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise BadOption(
            f"options: {kind.name} has no {', '.join(map(repr, unknown))}; it takes"
            f" {sorted(known) or 'none'}."
        )
    missing = [
        name for name, field in known.items() if field.default is MISSING and name not in options
    ]
    if missing:
        raise BadOption(
            f"options: {kind.name} needs {', '.join(f'{name}=' for name in missing)}; give it"
            " beside the mode."
        )
    return kind(**options)
