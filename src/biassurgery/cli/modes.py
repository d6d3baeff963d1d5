"""Modes and layers as they are written on a command line."""

from __future__ import annotations

from biassurgery.errors import BadOption
from biassurgery.modes import Layers, Mode, resolve_mode


def parse_mode(spec: str) -> Mode:
    """`set_mean`, or a mode with numbers as its options: `set_value:value=5`, `noise:scale=2`.

    Raises:
        UnknownMode, BadOption: not a mode, or not its option.
    """
    name, *pairs = spec.split(":")
    options = {}
    for pair in pairs:
        option, _, value = pair.partition("=")
        try:
            options[option] = int(value) if value.lstrip("-").isdecimal() else float(value)
        except ValueError as error:
            raise BadOption(
                f"mode: {spec!r}; write options as name=number, for example set_value:value=5."
            ) from error
    return resolve_mode(name, options)


def parse_layers(spec: str) -> Layers:
    """`first`, `all`, or indices: `2,5`.

    Raises:
        BadOption: none of these.
    """
    if spec in ("first", "all"):
        return spec
    try:
        return [int(part) for part in spec.split(",")]
    except ValueError as error:
        raise BadOption(f"layers: {spec!r}; use first, all, or indices such as 2,5.") from error
