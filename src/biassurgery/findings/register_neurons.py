"""`RegisterNeurons`: the few MLP neurons that make the outlier tokens of a vision transformer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from biassurgery.errors import BadOption
from biassurgery.findings.fields import items, real, whole, words
from biassurgery.findings.finding import Finding, check_finite
from biassurgery.findings.render import (
    MOST_ROWS,
    Printable,
    noted,
    number,
    one_screen,
    ranges,
    table,
)

if TYPE_CHECKING:
    from rich.console import Group


class RegisterNeuron(NamedTuple):
    """An input of an MLP's second linear layer, and its mean magnitude at the outlier tokens."""

    layer: int
    neuron: int
    activation: float


@dataclass(frozen=True, repr=False)
class RegisterNeurons(Printable, Finding):
    """The neurons that are most active at outlier tokens, the most active first.

    Attributes:
        neurons: where they are, and how active.
        architecture, layers, width: of the model that they were measured on.
        outlier_layer: the block at whose output outlier tokens were told by their norm.
        threshold: a patch with a larger norm is one.
        images: how many had outlier tokens; the mean is over these.
        tokens: how many outlier tokens they had together.

    Raises:
        BadOption: an activation or the threshold is not finite.
    """

    file_key: ClassVar[str] = "biassurgery.registers.neurons"
    what: ClassVar[str] = "register neurons"
    neurons: tuple[RegisterNeuron, ...]
    architecture: str
    layers: int
    width: int
    outlier_layer: int
    threshold: float
    images: int
    tokens: int

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        numbers = {f"activations ({neuron})": neuron.activation for neuron in self.neurons}
        numbers["threshold"] = self.threshold
        check_finite("neurons", numbers, "find_register_neurons(model, images) again")

    def __repr__(self) -> str:
        layers = ranges(neuron.layer for neuron in self.neurons)
        return one_screen(
            f"RegisterNeurons({len(self.neurons):,} neurons in layers [{layers}],"
            f" {self.architecture})"
        )

    @property
    def measured_on(self) -> dict[str, Any]:
        """Facts of the model that they were measured on, for `check_fits`."""
        return {"architecture": self.architecture, "layers": self.layers, "width": self.width}

    def first(self, count: int) -> RegisterNeurons:
        """The `count` most active ones."""
        return replace(self, neurons=self.neurons[:count])

    def by_layer(self) -> dict[int, list[int]]:
        """The neurons of each layer that has any, ascending."""
        return {
            layer: sorted(neuron.neuron for neuron in self.neurons if neuron.layer == layer)
            for layer in sorted({neuron.layer for neuron in self.neurons})
        }

    def __rich__(self) -> Group:
        """One row a neuron, and what it was measured on."""
        rows = table("Register neurons", "layer", "neuron", "mean activation")
        for neuron in self.neurons[:MOST_ROWS]:
            rows.add_row(str(neuron.layer), str(neuron.neuron), number(neuron.activation))
        more = (
            f"and {len(self.neurons) - MOST_ROWS} more; " if len(self.neurons) > MOST_ROWS else ""
        )
        return noted(
            rows,
            f"{more}at {self.tokens} outlier tokens of {self.images} images: patches with a norm"
            f" above {number(self.threshold)} at the output of block {self.outlier_layer}",
        )

    def header(self) -> dict[str, Any]:
        return asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def from_header(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> RegisterNeurons:
        layers = whole("layers", header["layers"], 1)
        neurons = tuple(
            RegisterNeuron(
                whole("layer", layer), whole("neuron", neuron), real("activation", activation)
            )
            for layer, neuron, activation in items("neurons", header["neurons"])
        )
        beyond = [neuron for neuron in neurons if neuron.layer >= layers]
        if beyond:
            raise BadOption(f"neurons: {beyond[0]} is beyond the {layers} layers.")
        counts = ("width", "outlier_layer", "images", "tokens")
        return cls(
            neurons,
            words("architecture", header["architecture"]),
            layers,
            threshold=real("threshold", header["threshold"]),
            **{name: whole(name, header[name]) for name in counts},
        )
