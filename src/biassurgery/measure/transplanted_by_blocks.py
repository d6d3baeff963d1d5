"""The same trial of a transplant, block by block: its forwards go beside the data."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from biassurgery.adapters.arguments import call
from biassurgery.adapters.devices import block_device
from biassurgery.adapters.registry import Host
from biassurgery.edits.transplant import TransplantEdit
from biassurgery.measure.forwards import Continued, Forward
from biassurgery.measure.start_key_values import Measuring
from biassurgery.measure.token_positions import fresh, shift_edits
from biassurgery.measure.transplanted import Trial
from biassurgery.surgery.edit import Place


class ByBlocksTrial:
    """Whether key and value stand in for the start token of a sequence, see `Trial`.

    At each block the start token runs alone and says what they are; the sequence and its parts
    follow with the token, and then without it, transplanted into that block as well.

    Args:
        host: a text model.
        name: of the argument that the sequence is.
        whole: (1, T) tokens or (1, T, D) embeddings, T at least 2.
    """

    def __init__(self, host: Host, name: str, whole: Tensor) -> None:
        self.host = host
        self.trial = trial = Trial(host, name, whole)
        self.measuring = Measuring(host)
        start = self.measuring.begin({name: whole})
        self.places = shift_edits(host)
        run = partial(call, host.model)
        self.start = Forward(
            host, partial(host.adapter.run, host.model, start), self.measuring.places()
        )
        self.with_token = Forward(host, partial(run, trial.with_token))
        self.parts_with_token = Continued(host, trial.parts_with_token, [])
        self.without = Forward(host, partial(run, trial.without), self.places)
        self.parts = Continued(host, trial.parts, self.places)

    def through(self, layer: int) -> None:
        """Let all of them go through one block, whose weights are there."""
        with fresh(self.host):
            self.start.through(layer)
            self.with_token.through(layer)
            self.parts_with_token.through(layer)
            self.places.append(self._transplant(layer))
            self.without.through(layer)
            self.parts.through(layer)

    def check(self) -> None:
        """Raise as `Trial.check` does, when they have been through all blocks."""
        self.trial.check(
            self.with_token.output,
            self.without.output,
            self.parts_with_token.outputs,
            self.parts.outputs,
        )

    def _transplant(self, layer: int) -> Place:
        """The edit that puts the start token's key and value into one block."""
        host = self.host
        attention = self.measuring.attending[layer]
        edit = TransplantEdit(attention, host.adapter.alibi(host.model, attention.module))
        edit.fill(*self.measuring.of_layer(layer))
        hidden = self.with_token.hidden
        assert hidden is not None  # it has been through
        edit.to(device=block_device(host.blocks[layer]), dtype=hidden.dtype)
        return attention.place(layer, edit)
