"""`RegisterMeans`: the mean register tokens of a vision transformer at every block's input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from biassurgery.errors import BadOption, FileError, Incompatible
from biassurgery.findings.fields import real, whole, words
from biassurgery.findings.files import as_path
from biassurgery.findings.finding import (
    Finding,
    check_adds_up,
    check_finite,
    check_spread,
    check_tensors,
)
from biassurgery.findings.render import one_screen
from biassurgery.findings.torch_files import read_torch
from biassurgery.ops.moments import merged_moments

_TENSORS = ("values", "std", "cls")
_ADVICE = "calibrate_registers(model, images) again"


@dataclass(frozen=True)
class MassiveRegister:
    """A massive value of `RegisterMeans`; `ratio`: over the registers' median magnitude there."""

    layer: int
    register: int
    channel: int
    value: float
    ratio: float


@dataclass(frozen=True, eq=False, repr=False)
class RegisterMeans(Finding):
    """Mean register features of a vision transformer. `a + b` merges two measurements of one model.

    Attributes:
        values: (layers, registers, channels) float32, at the INPUT of each block (as in the
            official code of Sun et al. 2024).
        std: of the same shape, standard deviation over images; None where it is not known.
        cls: (layers, channels) float32, the mean of [CLS]; None where there is none, or it is not
            known.
        count: images; 0 where it is not known.
        architecture: of the model that they were measured on; None: not known.
        factor: of its residual stream (mode `rescale`), in whose units they are.

    Raises:
        BadOption: the shapes are not those, or a number is not finite.
    """

    file_key: ClassVar[str] = "biassurgery.registers.means"
    what: ClassVar[str] = "register means"
    values: Tensor
    std: Tensor | None = None
    cls: Tensor | None = None
    count: int = 0
    architecture: str | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        self.check()
        object.__setattr__(self, "count", whole("count", self.count))
        if self.architecture is not None:
            words("architecture", self.architecture)
        real("factor", self.factor, 0.0)

    def of_factor(self, factor: float) -> RegisterMeans:
        """The means of the same model with its residual stream times a factor (mode `rescale`)."""
        named = {name: tensor * (factor / self.factor) for name, tensor in self.tensors().items()}
        return replace(self, **named, factor=factor)

    def check(self) -> None:
        check_tensors("means", {"values": self.values} | self.tensors(), _ADVICE)
        shape = tuple(self.values.shape)
        for name, tensor, expected in (
            ("std", self.std, shape),
            ("cls", self.cls, (*shape[:1], *shape[2:])),
        ):
            if len(shape) != 3 or (tensor is not None and tuple(tensor.shape) != expected):
                raise BadOption(
                    f"means: values {shape} and {name}"
                    f" {None if tensor is None else tuple(tensor.shape)}; give values and std as"
                    " (layers, registers, channels), cls as (layers, channels)."
                )
        check_finite("means", self.tensors(), _ADVICE)
        check_spread("means", {"std": self.std})

    def __repr__(self) -> str:
        layers, registers, width = self.values.shape
        return one_screen(
            f"RegisterMeans({layers} layers, {registers} registers, width {width},"
            f" {self.count or 'unknown number of'} images,"
            f" {self.architecture or 'unknown architecture'})"
        )

    @property
    def measured_on(self) -> dict[str, Any]:
        """Facts of the model that they were measured on, for `check_fits`."""
        return register_facts(self.architecture, *self.values.shape)

    def massive(
        self, *, min_magnitude: float = 100.0, min_ratio: float = 1000.0
    ) -> list[MassiveRegister]:
        """The massive activations among the means, the largest of a layer first.

        Source: Sun et al. 2024, section 2 and figure 14. The median is that of the registers' own
        magnitudes at the layer, for no other token is known here; it is larger than that of the
        whole hidden state where registers are larger than patches.
        """
        magnitude = self.values.abs()
        medians = magnitude.flatten(1).median(1).values
        hits = (magnitude > min_magnitude) & (magnitude > min_ratio * medians[:, None, None])
        massive = [
            MassiveRegister(
                layer,
                register,
                channel,
                self.values[layer, register, channel].item(),
                (magnitude[layer, register, channel] / medians[layer]).item(),
            )
            for layer, register, channel in hits.nonzero().tolist()
        ]
        return sorted(massive, key=lambda register: (register.layer, -abs(register.value)))

    def __add__(self, other: RegisterMeans) -> RegisterMeans:
        """Both measurements as one.

        Raises:
            Incompatible: they are of different models, or do not tell over how many images.
        """
        if not isinstance(other, RegisterMeans):
            return NotImplemented
        check_adds_up(
            "means",
            self._to_add(),
            other._to_add(),
            "add measurements of one model only",
        )
        if not self.count or not other.count or self.std is None or other.std is None:
            raise Incompatible(
                "means: only results of calibrate_registers() add up, for the others do not tell"
                " over how many images they are; calibrate on all images instead."
            )
        mean, std = merged_moments(
            self.values, other.values, self.std, other.std, self.count, other.count
        )
        count = self.count + other.count
        cls = None
        if self.cls is not None and other.cls is not None:
            total = self.count * self.cls.double() + other.count * other.cls.double()
            cls = (total / count).float()
        return RegisterMeans(mean, std, cls, count, self.architecture, self.factor)

    def _to_add(self) -> dict[str, Any]:
        """What means that add up have in common."""
        known = {"whether cls is known": self.cls is not None, "factor": self.factor}
        return self.measured_on | known

    def header(self) -> dict[str, Any]:
        header = {"count": self.count, "architecture": self.architecture}
        return header if self.factor == 1 else header | {"factor": self.factor}

    def tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_header(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> RegisterMeans:
        return cls(
            tensors["values"],
            tensors.get("std"),
            tensors.get("cls"),
            header["count"],
            header.get("architecture"),  # version 0.1.0 left it out where it was not known
            header.get("factor", 1.0),
        )

    @classmethod
    def load(cls, path: str | Path) -> RegisterMeans:
        """Read what `save` wrote, or the means that Sun et al. 2024 published.

        Those are a `.pt` file, a dict layer -> (registers, channels). A `.pt` file is read with
        `weights_only=True`: it cannot execute code; tensors saved on a GPU come to the CPU.

        Args:
            path: of the file.

        Raises:
            FileError: missing, truncated, damaged, of another kind, written by a newer version, or
                with numbers that are not finite.
        """
        path = as_path("path", path)
        if path.suffix not in (".pt", ".pth"):
            return super().load(path)
        try:
            return cls(_published(path))
        except BadOption as error:
            raise FileError(
                f"path: {path} holds means that cannot be used ({error}); fetch it again."
            ) from error


def register_facts(
    architecture: str | None, layers: int, registers: int, width: int
) -> dict[str, Any]:
    """What register means depend on."""
    shape = (layers, registers, width)
    return {"architecture": architecture, "shape of values (layers, registers, channels)": shape}


def _published(path: Path) -> Tensor:
    loaded = read_torch(path)
    layers = (
        sorted(loaded)
        if isinstance(loaded, dict) and all(type(key) is int for key in loaded)
        else []
    )
    shapes = {
        tuple(loaded[layer].shape) if isinstance(loaded[layer], Tensor) else None
        for layer in layers
    }
    if (
        not layers
        or layers != list(range(len(layers)))
        or len(shapes) != 1
        or len(next(iter(shapes)) or ()) != 2
    ):
        raise FileError(
            f"path: {path} holds {type(loaded).__name__}, not a dict of block index -> (registers,"
            " channels) from 0 on; pass one of the paper's files, or one written by"
            " RegisterMeans.save()."
        )
    named = {f"layer {layer}": loaded[layer] for layer in layers}
    check_tensors("means", named, "fetch the file again")
    return torch.stack([loaded[layer].float() for layer in layers])
