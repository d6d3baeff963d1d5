"""What `record` returns, and how it is filled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from biassurgery.errors import BadBatch, BadOption, UnsupportedModel
from biassurgery.kinds import path_of
from biassurgery.measure.quantities import Quantity
from biassurgery.measure.seen import SinkTokens
from biassurgery.surgery.threads import this_thread

Step = dict[str, dict[int, Tensor]]


class _Layers(dict[int, Tensor]):
    """What was recorded, by layer."""

    def __missing__(self, layer: int) -> Tensor:
        raise BadOption(
            f"layers: {layer!r} was not recorded; the layers that were are {sorted(self)}."
        )


class Record(Mapping[str, Mapping[int, Tensor]]):
    """What was recorded: `rec[name][layer]` of the latest forward.

    `rec.steps[i][name][layer]` is of every one.

    Attributes:
        steps: one entry a forward of the model, for example a step of cached decoding, in the order
            in which they began; forwards of several threads have one each.
    """

    def __init__(self, what: tuple[str, ...], layers: tuple[int, ...]) -> None:
        self.what = what
        self.layers = layers
        self.steps: list[Step] = []

    def __getitem__(self, name: str) -> Mapping[int, Tensor]:
        if name not in self.what:
            raise BadOption(
                f"name: {name!r} was not recorded; record(model, what=({name!r}, ...)) would, this"
                f" has {', '.join(self.what)}."
            )
        if not self.steps:
            raise BadBatch(
                "model: it has not run since record() began; run it inside the `with` block."
            )
        return self.steps[-1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.what)

    def __len__(self) -> int:
        return len(self.what)


class Forward(NamedTuple):
    """One forward: what is recorded of it, and the sinks of its batch where they are asked for."""

    step: Step
    sinks: SinkTokens | None


class Keeper:
    """Puts what observers see into a record.

    Args:
        record: the record.
        detach: whether gradients stop here.
        device: where to keep tensors; None: where they were computed.
    """

    def __init__(self, record: Record, detach: bool, device: torch.device | None) -> None:
        self.record = record
        self.detach = detach
        self.device = device
        self._forwards: dict[int, Forward] = {}  # the latest of each thread

    def begin(self, sinks: SinkTokens | None) -> None:
        """A forward begins, in this thread."""
        forward = Forward({name: _Layers() for name in self.record.what}, sinks)
        self._forwards[this_thread()] = self._latest = forward
        self.record.steps.append(forward.step)

    def forward(self) -> Forward:
        """The forward at hand.

        A backward may run blocks again in a thread of its own: they are taken for the latest's.

        Raises:
            BadBatch: none has begun.
        """
        if in_backward() and self._forwards:
            return self._forwards.get(this_thread(), self._latest)
        if this_thread() not in self._forwards:
            raise BadBatch(
                "model: a block ran by itself; call the model, so that its inputs are known."
            )
        return self._forwards[this_thread()]

    def keep(self, layer: int, quantity: Quantity, tensor: Tensor) -> None:
        """Take one quantity of one layer.

        Gradient checkpointing runs a block again in the backward: what that gives is known already,
        but has to be computed again, for it counts the tensors that are saved.
        """
        if in_backward():
            return
        recorded = self.forward().step[quantity.name]
        if layer in recorded:
            raise UnsupportedModel(
                f"model: block {layer} has more than one {quantity.name} in a forward; layers that"
                " are looped, or attend twice, cannot be recorded."
            )
        if not isinstance(tensor, Tensor):
            raise BadOption(
                f"what: {quantity.name!r} gave {type(tensor).__name__} for block {layer}, not a"
                f" tensor; correct of() of {path_of(type(quantity))}."
            )
        if self.detach:
            tensor = tensor.detach().clone() if quantity.reused else tensor.detach()
        recorded[layer] = tensor if self.device is None else tensor.to(self.device)


def in_backward() -> bool:
    """Whether autograd is running, as `torch.utils.checkpoint` asks."""
    return torch._C._current_graph_task_id() != -1
