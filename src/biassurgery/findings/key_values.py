"""`KeyValues`: what the start token of a sequence gives to attention, its mean key and value in
every layer and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from biassurgery.errors import FileError, IncompatibleSites
from biassurgery.findings.files import read_tensors, write_tensors
from biassurgery.ops.moments import merged_moments

FORMAT = "biassurgery.key_values"


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Mean key and value of the start token. `a + b` merges two measurements of one model.

    Attributes:
        keys: (layers, key-value heads, channels of a key) float32; with rotary positions, after the
            rotation.
        values: (layers, key-value heads, channels of a value) float32.
        key_std, value_std: of the same shapes, standard deviation over sequences; 0 where the start
            token is a constant.
        count: sequences.
        architecture: of the model that they were measured on.
    """

    keys: Tensor
    values: Tensor
    key_std: Tensor
    value_std: Tensor
    count: int
    architecture: str

    @property
    def spread(self) -> float:
        """Largest standard deviation over the root mean square of its layer's keys or values: 0
        means that a transplant is exact.
        """
        pairs = ((self.keys, self.key_std), (self.values, self.value_std))
        return max(
            (std.amax((1, 2)) / mean.square().mean((1, 2)).sqrt().clamp(min=1e-12)).max().item()
            for mean, std in pairs
        )

    def __add__(self, other: KeyValues) -> KeyValues:
        if not isinstance(other, KeyValues):
            return NotImplemented
        for name, ours, theirs in (
            ("architecture", self.architecture, other.architecture),
            ("keys", tuple(self.keys.shape), tuple(other.keys.shape)),
            ("values", tuple(self.values.shape), tuple(other.values.shape)),
        ):
            if ours != theirs:
                raise IncompatibleSites(
                    f"key_values: {name} {ours} and {theirs} differ; add measurements of one model"
                    " only."
                )
        count = self.count + other.count
        merged = [
            merged_moments(a, b, s, t, self.count, other.count)
            for a, b, s, t in (
                (self.keys, other.keys, self.key_std, other.key_std),
                (self.values, other.values, self.value_std, other.value_std),
            )
        ]
        (keys, key_std), (values, value_std) = merged
        return KeyValues(keys, values, key_std, value_std, count, self.architecture)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. Raises FileError if that is not possible."""
        tensors = {
            name: getattr(self, name).contiguous()
            for name in ("keys", "values", "key_std", "value_std")
        }
        write_tensors(
            Path(path),
            tensors,
            {FORMAT: "1", "count": str(self.count), "architecture": self.architecture},
        )

    @classmethod
    def load(cls, path: str | Path) -> KeyValues:
        """Read what `save` wrote. Raises FileError if the file does not hold it."""
        tensors, metadata = read_tensors(Path(path))
        try:
            if metadata[FORMAT] != "1":
                raise FileError(
                    f"path: {path} has format {metadata[FORMAT]!r}, this version reads 1; update"
                    " biassurgery."
                )
            return cls(
                tensors["keys"],
                tensors["values"],
                tensors["key_std"],
                tensors["value_std"],
                int(metadata["count"]),
                metadata["architecture"],
            )
        except (KeyError, ValueError) as error:
            raise FileError(
                f"path: {path} does not hold key values ({error!r}); pass a file written by"
                " KeyValues.save()."
            ) from error
