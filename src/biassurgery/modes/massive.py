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
from biassurgery.edits.levels import leave_out
from biassurgery.edits.massive import PositionEdit, ShuffleEdit, WriteEdit, ZeroRandomEdit
from biassurgery.errors import BadOption, LevelOverflow, UnsupportedModel, warn
from biassurgery.findings.births import gate_of
from biassurgery.findings.sites import Site, Sites
from biassurgery.modes.base import Mode, Place
from biassurgery.modes.choice import chosen_sites
from biassurgery.modes.varying import warn_of_varying_start
from biassurgery.surgery.block import BlockEdit


class SiteMode(Mode):
    """A mode that acts on the massive activations at the sites of each chosen layer."""

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        chosen = self.used(host, sites, layers)
        self.check_chosen(chosen)
        return [
            Place(layer, host.blocks[layer], self.edit(host, layer, chosen.at(layer)))
            for layer in chosen.layers()
        ]

    def used(self, host: Host, sites: Sites, layers: Layers) -> Sites:
        return chosen_sites(host, sites, layers)

    def check_chosen(self, sites: Sites) -> None:
        """Look at the sites of all layers together; raise or warn before anything is changed."""

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

    def check_chosen(self, sites: Sites) -> None:
        """Warn where values grow again, to other sizes than measured, beside ones left out."""
        written = {site: self.write(site) for site in sites}
        _check_numbers(self.name, "write", written)
        moved: dict[int, int] = {}  # channel -> the block at which its values became others
        for layer in sites.layers():
            here = sites.at(layer)
            for channel in sorted({site.channel for site in here}):
                group = [site for site in here if site.channel == channel]
                if channel in moved and leave_out(group) and any(site.first for site in group):
                    warn(
                        f"sites: in layer {layer}, channel {channel}, values grow again behind"
                        f" {self.name} at layer {moved[channel]}, to other sizes than were"
                        " measured, and are told by those from the values that were left out: a"
                        " patch may take one for the other. Keep all sites of this channel, or"
                        f" patch layer {moved[channel]} alone (layers={moved[channel]}).",
                    )
                gate = gate_of(group)
                if any(abs(written[site] - site.mean) > gate for site in group):
                    moved[channel] = layer

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

    def check_chosen(self, sites: Sites) -> None:
        super().check_chosen(sites)
        warn_of_varying_start(sites)

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
class ZeroRandom(Mode):
    """The control of `set_zero`: as many values of other channels at the same tokens become zero.

    The channels are drawn at random from those without sites in the patch.

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

    def used(self, host: Host, sites: Sites, layers: Layers) -> Sites:
        return chosen_sites(host, sites, layers)

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        chosen = self.used(host, sites, layers)
        massive = {site.channel for site in chosen}
        places = []
        for layer in chosen.layers():
            here = chosen.at(layer)
            channels = len({site.channel for site in here})
            if host.width < channels + len(massive):
                raise BadOption(
                    f"sites: {len(massive)} of {host.width} channels are sites, too many to draw"
                    f" {channels} others from at layer {layer}."
                )
            edit = ZeroRandomEdit(here, host.width, self.seed, massive)
            places.append(Place(layer, host.blocks[layer], edit))
        return places


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

    def used(self, host: Host, sites: Sites, layers: Layers) -> Sites:
        return sites if self.positions is not None else super().used(host, sites, layers)

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
