"""The mode that gives a trained vision transformer a register at test time.

Source: Jiang et al. 2025, section 4, appendix A.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.layers import Layers, all_or_indices
from biassurgery.adapters.parallel import check_neurons
from biassurgery.adapters.registry import Host
from biassurgery.edits.added_token import AddToken, CountToken, DropToken, NeuronEdit
from biassurgery.edits.massive import PositionEdit
from biassurgery.errors import AlreadyPatched, BadOption, Incompatible, UnsupportedModel
from biassurgery.findings.finding import check_fits
from biassurgery.findings.grid import prefix_of
from biassurgery.findings.register_neurons import RegisterNeurons
from biassurgery.findings.sites import Sites
from biassurgery.modes.base import Mode, Place
from biassurgery.surgery.block import added_tokens
from biassurgery.surgery.edit import edits_of
from biassurgery.surgery.linear import check_linear


@dataclass(frozen=True)
class TestTimeRegisters(Mode):
    """A token of zeros joins the input and takes the place of the outlier tokens.

    The register neurons are active at it alone. Inside the blocks the sequence is one token longer;
    the new one stands right behind the prefix tokens ([CLS], registers). It leaves the sequence
    behind the last block, so that the head and what the model returns have the shapes that they
    had. Adapt a model with PEFT before it is patched: a LoRA put on the MLP's second layer later
    reads the activations as they were.

    Attributes:
        neurons: what `find_register_neurons` found on this model.
    """

    name: ClassVar[str] = "test_time_registers"
    needs_sites: ClassVar[bool] = False
    neurons: RegisterNeurons

    def __post_init__(self) -> None:
        if not isinstance(self.neurons, RegisterNeurons):
            raise BadOption(
                f"neurons: {type(self.neurons).__name__}; pass what find_register_neurons(model,"
                " images) or RegisterNeurons.load(path) returned."
            )
        if not self.neurons.neurons:
            raise BadOption(
                "neurons: there are none; find_register_neurons(model, images, count=10) gives ten."
            )

    def places(self, host: Host, sites: Sites, layers: Layers) -> list[Place]:
        self.check_no_sites(sites)
        chosen = all_or_indices(host, layers, "registers")
        adapter = _checked(host)
        self._check_fits(host)
        position = prefix_of(host.roles)
        _check_positions(host, position)
        places = [Place(0, host.blocks[0], AddToken(position))]
        for layer, block in enumerate(host.blocks):
            for name in adapter.prefix_counters(host.model, block):
                places.append(Place(layer, block.get_submodule(name), CountToken()))
        for layer, neurons in self.neurons.by_layer().items():
            linear: Any = adapter.mlp_out(host.model, host.blocks[layer])
            check_linear(linear, layer)
            inputs = getattr(linear, "in_features", None)
            if isinstance(inputs, int) and neurons[-1] >= inputs:
                raise Incompatible(
                    f"neurons: {neurons[-1]} of layer {layer} is outside the {inputs} of this"
                    " model's MLP; find_register_neurons(model, images) on it."
                )
            places.append(Place(layer, linear, NeuronEdit(neurons, position)))
        places.append(Place(len(host.blocks) - 1, host.blocks[-1], DropToken(position)))
        layers_of_places = {place.layer for place in places if place.layer is not None}
        if chosen not in (None, sorted(layers_of_places)):
            raise BadOption(
                f"layers: {layers!r}; the neurons say which layers they are in, and the token goes"
                " through all of them; leave layers= out."
            )
        return places

    def _check_fits(self, host: Host) -> None:
        self.neurons.check()
        advice = "find_register_neurons(model, images) on this model"
        check_fits("neurons", self.neurons.measured_on, host.facts, advice)
        outside = [
            neuron
            for neuron in self.neurons.neurons
            if not 0 <= neuron.layer < len(host.blocks) or neuron.neuron < 0
        ]
        if outside:
            raise Incompatible(
                f"neurons: {outside[0]} is not in this model, whose blocks are 0 to"
                f" {len(host.blocks) - 1}; find_register_neurons(model, images) on it."
            )

    def options(self) -> dict[str, Any]:
        return {"neurons": self.neurons.header()}

    @classmethod
    def from_saved(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> TestTimeRegisters:
        return cls(RegisterNeurons.from_header(options["neurons"], {}))


def _check_positions(host: Host, position: int) -> None:
    """Raise `BadOption` if a patch on the model writes to tokens that would move."""
    written = [
        edit for block in host.blocks for edit in edits_of(block) if isinstance(edit, PositionEdit)
    ]
    if any(int(edit.positions.max()) >= position for edit in written):
        raise BadOption(
            "mode: 'set_value' writes at positions behind the prefix tokens, which the added token"
            " would move by one; unpatch_model(model, 'set_value') first, and apply it again"
            " afterwards, with positions that count that token."
        )


def _checked(host: Host) -> ImageAdapter:
    """The adapter of a model that a token can be added to."""
    if not isinstance(host.adapter, ImageAdapter):
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} reads text; test-time registers are of vision"
            " transformers."
        )
    check_neurons(host)
    if host.layout != "BTD":
        raise UnsupportedModel(
            f"model: the blocks of {type(host.model).__name__} have their tokens on the axes"
            f" {host.layout}; a token can be added to (B, T, D) only."
        )
    if any(c.__name__ == "BackboneMixin" for c in type(host.root).__mro__):
        raise UnsupportedModel(
            f"model: {type(host.root).__name__} hands out hidden states from inside, which would"
            " hold the added token and be reshaped with it; use the model class that returns the"
            " last hidden state."
        )
    if added_tokens(host.blocks[0]):
        raise AlreadyPatched(
            "mode: a test-time register is on the model already; unpatch_model(model,"
            " 'test_time_registers') first."
        )
    return host.adapter
