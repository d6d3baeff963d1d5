"""Modes and layers as they are written on a command line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from biassurgery.edits.bias import BIASES
from biassurgery.errors import BadOption
from biassurgery.modes import MODES, Layers, resolve_mode

# The option of a mode that a finding goes to, and which finding.
_NEEDS = {
    "transplant": ("key_values", "key_values"),
    "fix_registers": ("means", "means"),
    "test_time_registers": ("neurons", "neurons"),
}
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Asked:
    """A mode as it was asked for; what it still needs is a finding.

    Attributes:
        name: of the mode.
        options: of it, as far as they are given.
        needs: the option that a finding goes to, and which of `Given`; None: it needs none.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, str] | None = None

    @property
    def needs_sites(self) -> bool:
        return MODES[self.name].needs_sites

    @property
    def replaces_start(self) -> bool:
        return MODES[self.name].replaces_start


def parse_mode(spec: str) -> Asked:
    """`set_mean`, or a mode with options: `set_value:value=5`, `attention_bias:kind=k`.

    Options are numbers, or words where the mode takes words.

    Raises:
        UnknownMode, BadOption: not a mode, or not its option.
    """
    name, *pairs = spec.split(":")
    kind = MODES.find(name)
    words = {one.name for one in fields(kind) if isinstance(one.default, str | bool)} | {"init"}
    options = {}
    for pair in pairs:
        option, _, value = pair.partition("=")
        options[option] = _value(spec, value, option in words)
    needs = _needs(name, options)
    if needs is None:
        resolve_mode(name, options)  # refuses what cannot be
    return Asked(name, options, needs)


def _value(spec: str, value: str, may_be_word: bool) -> Any:
    if may_be_word and value:
        return _WORDS.get(value, value)
    try:
        return int(value) if value.lstrip("-").isdecimal() else float(value)
    except ValueError as error:
        raise BadOption(
            f"mode: {spec!r}; write options as name=number, for example set_value:value=5."
        ) from error


def _needs(name: str, options: dict[str, Any]) -> tuple[str, str] | None:
    if name == "attention_bias":
        has_key_values = BIASES.find(options.get("kind", "kv")).has_key_values
        return ("init", "key_values") if has_key_values and "init" not in options else None
    if name == "fix_registers" and options.get("fill", "mean") not in ("mean", "noise"):
        return None
    return _NEEDS.get(name)


def parse_layers(spec: str) -> Layers:
    """`first`, which is each mode's own default, `all`, or indices: `2,5`.

    Raises:
        BadOption: none of these.
    """
    if spec == "first":
        return None
    return spec if spec == "all" else parse_indices(spec, "first, all, or")


def parse_indices(spec: str, others: str) -> list[int]:
    """Indices: `2,5`; `others` names what else there may be.

    Raises:
        BadOption: none.
    """
    try:
        return [int(part) for part in spec.split(",")]
    except ValueError as error:
        raise BadOption(f"layers: {spec!r}; use {others} indices such as 2,5.") from error
