"""`RegisterMeans`: what the register tokens of a vision transformer are on average, at the input of
every block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from biassurgery.errors import FileError, IncompatibleSites
from biassurgery.findings.files import read_tensors, write_tensors
from biassurgery.ops.moments import merged_moments

FORMAT = "biassurgery.registers.means"


@dataclass(frozen=True)
class MassiveRegister:
    """One value of a `RegisterMeans` that meets the definition; `ratio`: over the median magnitude
    of the registers at that layer.
    """

    layer: int
    register: int
    channel: int
    value: float
    ratio: float


@dataclass(frozen=True, eq=False)
class RegisterMeans:
    """Mean register features of a vision transformer. `a + b` merges two measurements of one model.

    Attributes:
        values: (layers, registers, channels) float32, at the INPUT of each block (as in the
            official code of Sun et al. 2024).
        std: of the same shape, standard deviation over images; None where it is not known.
        cls: (layers, channels) float32, the mean of [CLS]; None where there is none, or it is not
            known.
        count: images; 0 where it is not known.
        architecture: of the model that they were measured on; None: not known.
    """

    values: Tensor
    std: Tensor | None = None
    cls: Tensor | None = None
    count: int = 0
    architecture: str | None = None

    def massive(
        self, *, min_magnitude: float = 100.0, min_ratio: float = 1000.0
    ) -> list[MassiveRegister]:
        """The massive activations among the means (Sun et al. 2024, section 2 and figure 14), the
        largest of a layer first.

        The median is that of the registers' own magnitudes at the layer, for no other token is
        known here; it is larger than that of the whole hidden state where registers are larger than
        patches.
        """
        magnitude = self.values.abs()
        medians = magnitude.flatten(1).median(1).values
        hits = (magnitude > min_magnitude) & (magnitude > min_ratio * medians[:, None, None])
        found = [
            MassiveRegister(
                layer,
                register,
                channel,
                self.values[layer, register, channel].item(),
                (magnitude[layer, register, channel] / medians[layer]).item(),
            )
            for layer, register, channel in hits.nonzero().tolist()
        ]
        return sorted(found, key=lambda each: (each.layer, -abs(each.value)))

    def __add__(self, other: RegisterMeans) -> RegisterMeans:
        if not isinstance(other, RegisterMeans):
            return NotImplemented
        for name, ours, theirs in (
            ("architecture", self.architecture, other.architecture),
            ("values", tuple(self.values.shape), tuple(other.values.shape)),
            ("cls", self.cls is None, other.cls is None),
        ):
            if ours != theirs:
                raise IncompatibleSites(
                    f"means: {name} {ours} and {theirs} differ; add measurements of one model only."
                )
        if not self.count or not other.count or self.std is None or other.std is None:
            raise IncompatibleSites(
                "means: only results of calibrate_registers() add up, for the others do not tell"
                " over how many images they are; calibrate on all images instead."
            )
        mean, std = merged_moments(
            self.values, other.values, self.std, other.std, self.count, other.count
        )
        count = self.count + other.count
        cls = (
            None
            if self.cls is None or other.cls is None
            else (
                (self.count * self.cls.double() + other.count * other.cls.double()) / count
            ).float()
        )
        return RegisterMeans(mean, std, cls, count, self.architecture)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. Raises FileError if that is not possible."""
        tensors = {
            name: tensor
            for name in ("values", "std", "cls")
            if (tensor := getattr(self, name)) is not None
        }
        metadata = {FORMAT: "1", "count": str(self.count)}
        write_tensors(
            path,
            tensors,
            (
                metadata
                if self.architecture is None
                else metadata | {"architecture": self.architecture}
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> RegisterMeans:
        """Read what `save` wrote, or the means that Sun et al. 2024 published: a `.pt` file, dict
        layer -> (registers, channels).

        A `.pt` file is read with `weights_only=True`: it cannot execute code; tensors saved on a
        GPU come to the CPU.

        Raises:
            FileError: missing, truncated, or of another kind.
        """
        if Path(path).suffix in (".pt", ".pth"):
            return cls(_published(Path(path)))
        tensors, metadata = read_tensors(path)
        if metadata.get(FORMAT) != "1" or "values" not in tensors:
            raise FileError(
                f"path: {path} does not hold register means of format 1; pass a file written by"
                " RegisterMeans.save()."
            )
        return cls(
            tensors["values"],
            tensors.get("std"),
            tensors.get("cls"),
            int(metadata.get("count", 0)),
            metadata.get("architecture"),
        )


def _published(path: Path) -> Tensor:
    from pickle import UnpicklingError

    if not path.is_file():
        raise FileError(f"path: {path} is not a file; check the name.")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, ValueError) as error:
        raise FileError(
            f"path: {path} cannot be read as tensors ({error}); it may be truncated, or hold more"
            " than tensors."
        ) from error
    layers = (
        sorted(loaded)
        if isinstance(loaded, dict) and all(isinstance(key, int) for key in loaded)
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
    return torch.stack([loaded[layer].float() for layer in layers])
