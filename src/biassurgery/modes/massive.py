"""The modes on activations: what becomes of the massive values of a block's output.

Source: Sun et al. 2024, section 3.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import ClassVar

import torch

from biassurgery.adapters.layers import Layers, block_dtype, integers, layer_indices
from biassurgery.adapters.registry import Host
from biassurgery.edits.massive import PositionEdit, ShuffleEdit, WriteEdit, ZeroRandomEdit
from biassurgery.errors import BadOption, LayerOutOfRange, LevelOverflow, NoSites, UnsupportedModel
from biassurgery.findings.sites import Site, Sites
from biassurgery.modes.base import Mode, Place
from biassurgery.surgery.block import BlockEdit


class SiteMode(Mode):
    """A mode that acts on the massive activations at the sites of each chosen layer."""

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        if not len(sites):
            raise NoSites(
                f"sites: there is nothing to change, for the sites are empty{_from(sites)}. The"
                " model may have no massive activations by this definition; detect(model, batches)"
                " shows its largest values, and calibrate() takes min_magnitude= and min_ratio=."
            )
        _check_range(host, sites)
        return [
            Place(layer, host.blocks[layer], self.edit(host, layer, sites.at(layer)))
            for layer in _choose(host, sites, layers)
        ]

    @abstractmethod
    def edit(self, host: Host, layer: int, sites: Sites) -> BlockEdit:
        """The edit of one layer."""


class WriteMode(SiteMode):
    """A mode that writes a known value over each massive one."""

    @abstractmethod
    def write(self, site: Site) -> float:
        """What to write."""

    def spread(self, site: Site) -> float | None:
        """Standard deviation of the noise around it; None: none."""
        return None

    def edit(self, host: Host, layer: int, sites: Sites) -> BlockEdit:
        values = {site: self.write(site) for site in sites}
        spread = {site: s for site in sites if (s := self.spread(site)) is not None}
        for method, numbers in (("write", values), ("spread", spread)):
            _check_numbers(self.name, method, numbers)
        edit = WriteEdit(sites, values, spread or None)
        check_holds(self.name, edit.largest, host, layer)
        return edit


@dataclass(frozen=True)
class SetMean(WriteMode):
    """Massive activations become their calibrated means: what the model computes stays."""

    name: ClassVar[str] = "set_mean"

    def write(self, site: Site) -> float:
        return site.mean


@dataclass(frozen=True)
class SetZero(WriteMode):
    """Massive activations become zero: the model breaks if it depends on them."""

    name: ClassVar[str] = "set_zero"

    def write(self, site: Site) -> float:
        return 0.0


@dataclass(frozen=True)
class Noise(WriteMode):
    """Massive activations become their mean plus normal noise of `scale` times their std."""

    name: ClassVar[str] = "noise"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Real) or not 0 <= self.scale < math.inf:
            raise BadOption(
                f"scale: {self.scale!r}; give a number of at least 0, where 1 is the calibrated"
                " standard deviation."
            )
        object.__setattr__(self, "scale", float(self.scale))  # numpy's floats cannot be saved

    def write(self, site: Site) -> float:
        return site.mean

    def spread(self, site: Site) -> float | None:
        return site.std * self.scale


@dataclass(frozen=True)
class Shuffle(SiteMode):
    """Massive activations become those of another sequence of the batch, of two at least."""

    name: ClassVar[str] = "shuffle"

    def edit(self, host: Host, layer: int, sites: Sites) -> BlockEdit:
        return ShuffleEdit(sites)


@dataclass(frozen=True)
class ZeroRandom(SiteMode):
    """The control of `set_zero`: as many values of other channels at the same tokens become zero.

    The channels are drawn at random.

    Attributes:
        seed: decides the channels that are drawn.
    """

    name: ClassVar[str] = "zero_random"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):
            raise BadOption(
                f"seed: {self.seed!r}; give an integer, which decides the channels that are drawn."
            )

    def edit(self, host: Host, layer: int, sites: Sites) -> BlockEdit:
        channels = len({site.channel for site in sites})
        if host.width < 2 * channels:
            raise BadOption(
                f"sites: {channels} of {host.width} channels are sites at layer {layer}, too many"
                " to draw others from."
            )
        return ZeroRandomEdit(sites, host.width, self.seed)


@dataclass(frozen=True)
class SetValue(WriteMode):
    """Massive activations become `value`; with `channels` and `positions`, whatever stands there.

    Positions count from the beginning of the sequence, padding and cached tokens included. With
    positions no sites are used, and `layers` must be indices.
    """

    name: ClassVar[str] = "set_value"
    value: float
    channels: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for option in ("channels", "positions"):
            value = getattr(self, option)
            if value is not None:
                indices = integers(option, value, "give one or more integers")
                object.__setattr__(self, option, indices)
        if (self.channels is None) != (self.positions is None):
            missing = "positions" if self.positions is None else "channels"
            raise BadOption(
                f"{missing}: None; set_value takes channels and positions together, or neither to"
                " write over the sites."
            )
        if not isinstance(self.value, Real) or not math.isfinite(self.value):
            raise BadOption(
                f"value: {self.value!r} is not a finite number; give one, for example value=0.0."
            )
        object.__setattr__(self, "value", float(self.value))  # numpy's floats cannot be saved

    @property
    def needs_sites(self) -> bool:  # type: ignore[override]
        return self.positions is None

    def write(self, site: Site) -> float:
        return self.value

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        if self.channels is None or self.positions is None:
            return super().places(host, sites, layers)
        if isinstance(layers, str) or layers is None:
            raise BadOption(
                f"layers: {layers!r}; set_value at positions needs layer indices, for example"
                " layers=[0]."
            )
        if host.adapter.recurrent(host.model):
            raise UnsupportedModel(
                f"positions: {self.positions}; {type(host.model).__name__} keeps a recurrent state,"
                " which does not tell how many tokens it has read, so a position is not known in"
                " cached decoding; leave channels= and positions= out and write over the sites."
            )
        for channel in self.channels:
            if not 0 <= channel < host.width:
                raise BadOption(
                    f"channels: {channel} is outside the {host.width} channels of this model; use 0"
                    f" to {host.width - 1}."
                )
        if any(position < 0 for position in self.positions):
            raise BadOption(
                f"positions: {self.positions} has a negative one; count from the beginning of the"
                " sequence."
            )
        chosen = layer_indices(host, layers)
        for layer in chosen:
            check_holds(self.name, self.value, host, layer)
        edit = partial(PositionEdit, self.value, self.channels, self.positions, host.width)
        return [Place(layer, host.blocks[layer], edit(layer)) for layer in chosen]


def _from(sites: Sites) -> str:
    return f" (from {sites.origin.source})" if sites.origin.source else ""


def _check_range(host: Host, sites: Sites) -> None:
    for site in sites:
        if not 0 <= site.layer < len(host.blocks):
            raise LayerOutOfRange(
                f"sites: layer {site.layer} is outside the {len(host.blocks)} blocks of this model;"
                " calibrate on it."
            )
        if not 0 <= site.channel < host.width:
            raise BadOption(
                f"sites: channel {site.channel} is outside the {host.width} channels of this model;"
                " calibrate on it."
            )
        if site.gate is None and not site.mean:
            raise BadOption(
                f"sites: {site} has a mean of 0 and no gate, so that every value would be massive;"
                " give it a gate=."
            )
        if site.gate is not None and site.gate < 0:
            raise BadOption(
                f"sites: {site} has a gate that no magnitude can be compared with; calibrate again,"
                " or give gate=None."
            )


def _choose(host: Host, sites: Sites, layers: Layers) -> list[int]:
    """The layers to change: a name or indices, each with at least one site."""
    if layers is None:
        layers = "first"
    if isinstance(layers, str):
        if layers not in ("first", "all"):
            raise BadOption(f"layers: {layers!r}; use 'first', 'all' or indices.")
        return sites.layers()[:1] if layers == "first" else sites.layers()
    chosen = layer_indices(host, layers)
    without = [layer for layer in chosen if layer not in sites.layers()]
    if without:
        raise LayerOutOfRange(
            f"layers: {without} have no sites; sites are at layers {sites.layers()}."
        )
    return chosen


def _check_numbers(name: str, method: str, numbers: dict[Site, float]) -> None:
    """Raise `BadOption` if a mode would write something that is no finite number."""
    for site, number in numbers.items():
        if not isinstance(number, Real) or not math.isfinite(number):
            raise BadOption(
                f"mode: {method}() of {name} gives {number!r} for {site}; it must give a finite"
                " number."
            )


def check_holds(name: str, value: float, host: Host, layer: int) -> None:
    """Raise `LevelOverflow` if the block's dtype cannot hold the value."""
    dtype = block_dtype(host.blocks[layer])
    if abs(value) > torch.finfo(dtype).max:
        raise LevelOverflow(
            f"mode: {name} would write {value:g} at layer {layer}, but the model's {dtype} ends at "
            f"{torch.finfo(dtype).max:g}; convert the model to bfloat16 or float32 first."
        )
