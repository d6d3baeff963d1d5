"""`RegisterNeurons`: the few MLP neurons that make the outlier tokens of a vision transformer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from biassurgery.errors import FileError
from biassurgery.findings.files import read_tensors, write_tensors
from biassurgery.findings.render import MOST_ROWS, Printable, noted, number, table

if TYPE_CHECKING:
    from rich.console import Group

FORMAT = "biassurgery.registers.neurons"


class RegisterNeuron(NamedTuple):
    """An input of the second linear layer of a block's MLP, and its mean magnitude at the outlier
    tokens.
    """

    layer: int
    neuron: int
    activation: float


@dataclass(frozen=True)
class RegisterNeurons(Printable):
    """The neurons that are most active at outlier tokens, the most active first.

    Attributes:
        neurons: where they are, and how active.
        architecture, layers, width: of the model that they were measured on.
        outlier_layer: the block at whose output outlier tokens were told by their norm.
        threshold: a patch with a larger norm is one.
        images: how many had outlier tokens; the mean is over these.
        tokens: how many outlier tokens they had together.
    """

    neurons: tuple[RegisterNeuron, ...]
    architecture: str
    layers: int
    width: int
    outlier_layer: int
    threshold: float
    images: int
    tokens: int

    def first(self, count: int) -> RegisterNeurons:
        """The `count` most active ones."""
        return replace(self, neurons=self.neurons[:count])

    def by_layer(self) -> dict[int, list[int]]:
        """The neurons of each layer that has any, ascending."""
        return {
            layer: sorted(each.neuron for each in self.neurons if each.layer == layer)
            for layer in sorted({each.layer for each in self.neurons})
        }

    def __rich__(self) -> Group:
        """One row a neuron, and what it was measured on."""
        rows = table("Register neurons", "layer", "neuron", "mean activation")
        for each in self.neurons[:MOST_ROWS]:
            rows.add_row(str(each.layer), str(each.neuron), number(each.activation))
        more = (
            f"and {len(self.neurons) - MOST_ROWS} more; " if len(self.neurons) > MOST_ROWS else ""
        )
        return noted(
            rows,
            f"{more}at {self.tokens} outlier tokens of {self.images} images: patches with a norm"
            f" above {number(self.threshold)} at the output of block {self.outlier_layer}",
        )

    def header(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_header(cls, header: dict[str, Any]) -> RegisterNeurons:
        """Rebuild it from its JSON form."""
        neurons = tuple(
            RegisterNeuron(int(layer), int(neuron), float(activation))
            for layer, neuron, activation in header["neurons"]
        )
        return cls(**{**header, "neurons": neurons})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; all is in its JSON header. Raises FileError if that is not
        possible.
        """
        write_tensors(path, {}, {FORMAT: json.dumps({"format": 1} | self.header())})

    @classmethod
    def load(cls, path: str | Path) -> RegisterNeurons:
        """Read what `save` wrote. Raises FileError if the file does not hold it."""
        _, metadata = read_tensors(path)
        try:
            header = json.loads(metadata[FORMAT])
            if header.pop("format") != 1:
                raise FileError(
                    f"path: {path} holds register neurons of a newer format; update biassurgery."
                )
            return cls.from_header(header)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"path: {path} does not hold register neurons ({error!r}); pass a file written by"
                " RegisterNeurons.save()."
            ) from error
