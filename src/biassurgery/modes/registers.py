"""The mode on registers: they become constants. Source: Sun et al. 2024, section 5.2, table 5."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from biassurgery.adapters.layers import Layers, all_or_indices, integers
from biassurgery.adapters.registry import Host, first_register
from biassurgery.adapters.scale import in_units_of, scale_of
from biassurgery.edits.registers import RegisterEdit, ShuffledRegisters
from biassurgery.errors import BadOption, CalibrationRequired, UnsupportedModel
from biassurgery.findings.finding import check_fits
from biassurgery.findings.register_means import RegisterMeans, register_facts
from biassurgery.findings.sites import Sites
from biassurgery.modes.base import Mode, Place
from biassurgery.modes.massive import check_holds

Fill = Literal["mean", "zero", "noise", "shuffle"]


@dataclass(frozen=True)
class FixRegisters(Mode):
    """The register tokens of a vision transformer become constants, at the input of every block.

    Attributes:
        fill: `mean`: their means over images, as in table 5; `zero`; `noise`: mean plus normal
            noise of their standard deviation; `shuffle`: those of another image of the batch.
        means: what `calibrate_registers` measured, or `RegisterMeans.load(...)`; for `mean` and
            `noise`.
        registers: which of them, counted from 0; None: all.
        cls: also [CLS], which then carries nothing of the image.
    """

    name: ClassVar[str] = "fix_registers"
    needs_sites: ClassVar[bool] = False
    fill: Fill = "mean"
    means: RegisterMeans | None = field(default=None, compare=False)
    registers: tuple[int, ...] | None = None
    cls: bool = False

    def __post_init__(self) -> None:
        if self.fill not in get_args(Fill):
            raise BadOption(
                f"fill: {self.fill!r}; use one of {', '.join(map(repr, get_args(Fill)))}."
            )
        if self.means is not None and not isinstance(self.means, RegisterMeans):
            raise BadOption(
                f"means: {type(self.means).__name__}; pass what calibrate_registers(model, images)"
                " or RegisterMeans.load(path) returned."
            )
        if self.means is None and self.fill in ("mean", "noise"):
            raise CalibrationRequired(
                f"means: None, but fill={self.fill!r} needs the means of this model's registers."
                " Measure them:\n\n    means = calibrate_registers(model, images)        #"
                " pixel_values: (B, 3, H, W), normalised\n    patch_model(model, 'fix_registers',"
                f" fill={self.fill!r}, means=means)"
            )
        if self.fill == "noise" and self.means is not None and self.means.std is None:
            raise BadOption(
                "means: they have no standard deviation, which fill='noise' needs; use"
                " calibrate_registers(model, images)."
            )
        if self.registers is not None:
            object.__setattr__(
                self,
                "registers",
                integers("registers", self.registers, "give one or more indices, counted from 0"),
            )
        if not isinstance(self.cls, bool):
            raise BadOption(f"cls: {self.cls!r}; use True or False.")

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        self.check_no_sites(sites)
        positions, columns = self._tokens(host)
        self._check_fits(host)
        if self.means is not None and self.means.factor != scale_of(host):
            return replace(self, means=in_units_of(host, "means", self.means)).places(
                host, sites, layers
            )
        chosen = all_or_indices(host, layers, "registers") or range(len(host.blocks))
        return [
            Place(layer, host.blocks[layer], self._edit(host, layer, positions, columns))
            for layer in chosen
        ]

    def _tokens(self, host: Host) -> tuple[list[int], list[int]]:
        """Where the tokens are in the sequence, and their rows of `_table`: 0 is [CLS]."""
        first = first_register(host)
        count = sum(role.startswith("register:") for role in host.roles)
        chosen = range(count) if self.registers is None else sorted(set(self.registers))
        outside = [index for index in chosen if not 0 <= index < count]
        if outside:
            raise BadOption(
                f"registers: {outside} are outside the {count} registers of this model; count"
                " from 0."
            )
        positions = [first + index for index in chosen]
        columns = [1 + index for index in chosen]
        if not self.cls:
            return positions, columns
        if host.roles[0] != "cls":
            raise UnsupportedModel(
                f"cls: True, but {type(host.model).__name__} has no [CLS]; leave cls= out."
            )
        if self.means is not None and self.means.cls is None and self.fill in ("mean", "noise"):
            raise BadOption(
                "cls: True, but the means are of registers only; use calibrate_registers(model,"
                " images)."
            )
        return [0, *positions], [0, *columns]

    def _check_fits(self, host: Host) -> None:
        if self.means is None:
            return
        self.means.check()
        registers = sum(role.startswith("register:") for role in host.roles)
        check_fits(
            "means",
            self.means.measured_on,
            register_facts(host.architecture, len(host.blocks), registers, host.width),
            "calibrate_registers(model, images) on it",
        )

    def _edit(
        self, host: Host, layer: int, positions: list[int], columns: list[int]
    ) -> RegisterEdit:
        if self.fill == "shuffle":
            edit: RegisterEdit = ShuffledRegisters(
                positions, torch.zeros(len(positions), host.width)
            )
        else:
            edit = RegisterEdit(
                positions, self._table(layer, host)[columns], self._spread(layer, host, columns)
            )
        check_holds(self.name, edit.largest, host, layer)
        return edit

    def _table(self, layer: int, host: Host) -> Tensor:
        """(1 + registers, D): what [CLS] and the registers become."""
        if self.fill == "zero" or self.means is None:
            return torch.zeros(1 + len(host.roles), host.width)
        cls = torch.zeros(host.width) if self.means.cls is None else self.means.cls[layer]
        return torch.cat([cls[None], self.means.values[layer]])

    def _spread(self, layer: int, host: Host, columns: list[int]) -> Tensor | None:
        if self.fill != "noise" or self.means is None or self.means.std is None:
            return None
        return torch.cat([torch.zeros(1, host.width), self.means.std[layer]])[columns]

    def options(self) -> dict[str, Any]:
        known = {} if self.means is None else self.means.header()
        return {"fill": self.fill, "registers": self.registers, "cls": self.cls, "means": known}

    def tensors(self) -> dict[str, Tensor]:
        if self.means is None:
            return {}
        return {
            name: tensor
            for name in ("values", "std", "cls")
            if (tensor := getattr(self.means, name)) is not None
        }

    @classmethod
    def from_saved(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> FixRegisters:
        means = RegisterMeans(**tensors, **options["means"]) if tensors else None
        registers = options["registers"]
        return cls(
            options["fill"], means, None if registers is None else tuple(registers), options["cls"]
        )
