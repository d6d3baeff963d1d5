"""What the rows of an intervention table are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from biassurgery.findings.finding import Finding
from biassurgery.modes import Mode


def label_of(mode: Mode) -> str:
    """A mode's name, with the fields that are not at their default: `noise(scale=2.0)`.

    Of a finding its class is named, unless the mode is never without one.
    """
    options = []
    for field in fields(mode):
        value = getattr(mode, field.name)
        required = field.default is MISSING
        if isinstance(value, Finding):
            options += [] if required else [f"{field.name}={type(value).__name__}"]
        elif required or value != field.default:
            options.append(f"{field.name}={value!r}")
    return f"{mode.name}({', '.join(options)})" if options else mode.name


def findings_of(mode: Mode | None) -> list[Finding]:
    """The findings that a mode is made from."""
    if mode is None:
        return []
    values = (getattr(mode, field.name) for field in fields(mode))
    return [value for value in values if isinstance(value, Finding)]


def free_label(label: str, chosen: Mapping[str, Any]) -> str:
    """A label, numbered where another mode, made from another finding, has it."""
    labels = (label, *(f"{label} #{number}" for number in range(2, len(chosen) + 2)))
    return next(one for one in labels if one not in chosen)
