"""The edits of `test_time_registers`: a token more inside the model, and neurons that are active at
it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from biassurgery.errors import AlreadyPatched, UnsupportedModel
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.swap import (
    Edit,
    Swapped,
    check_swappable,
    edits_of,
    host_class,
    on_top,
    set_class,
    swapped_class,
)

NAME = "register_neurons"  # the child of an edited linear layer that is its edit


class AddToken(BlockEdit):
    """Puts a token of zeros into what a block reads, at `position`."""

    at = "input"
    adds = 1

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        zeros = hidden.new_zeros(len(hidden), 1, hidden.shape[-1])
        return torch.cat([hidden[:, : self.position], zeros, hidden[:, self.position :]], 1)


class DropToken(BlockEdit):
    """Takes the token at `position` out of what leaves a block; all other edits and observers of
    the block still see it.
    """

    at = "exit"

    def __init__(self, position: int) -> None:
        super().__init__()
        self.position = position

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        return torch.cat([hidden[:, : self.position], hidden[:, self.position + 1 :]], 1)


class CountToken(BlockEdit):
    """Lets modules in a block count one prefix token more while it is attached: rotary attention
    leaves that many tokens as they are.

    Args:
        counters: the names of these modules in the block.
    """

    def __init__(self, counters: list[str]) -> None:
        super().__init__()
        self.counters = counters

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        return hidden

    def attach(self, module: nn.Module) -> None:
        super().attach(module)
        self._count(module, 1)

    def detach(self, module: nn.Module) -> None:
        if self in edits_of(module):
            self._count(module, -1)
        super().detach(module)

    def _count(self, block: nn.Module, more: int) -> None:
        for name in self.counters:
            counter: Any = block.get_submodule(name)
            counter.num_prefix_tokens += more


class NeuronEdit(Edit):
    """Moves the activation of register neurons to one token: there it becomes the largest of the
    image, at all others 0.

    The largest by magnitude, with its sign, over all tokens of the image, the added one included.
    Static shapes, nothing read back to the host. Source: Jiang et al. 2025, appendix A.3, algorithm
    2, which takes the maximum: the same for neurons that cannot be large and negative (ReLU, GELU);
    those of gated MLPs can.

    Args:
        neurons: inputs of the linear layer.
        position: of the token.
    """

    neurons: Tensor  # (N,) int64

    def __init__(self, neurons: list[int], position: int) -> None:
        super().__init__()
        self.position = position
        self.register_buffer("neurons", torch.tensor(neurons), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        active = x.index_select(-1, self.neurons)
        low = active.amin(-2, keepdim=True)
        high = active.amax(-2, keepdim=True)
        largest = torch.where(high >= -low, high, low)
        alone = pad(largest, (0, 0, self.position, x.shape[-2] - self.position - 1))
        return x.index_copy(-1, self.neurons, alone)

    def attach(self, module: nn.Module) -> None:
        if NAME in module._modules:
            raise AlreadyPatched(
                "mode: this layer has its register neurons moved already; unpatch_model(model, "
                "'test_time_registers') first."
            )
        if not isinstance(module, EditedLinear):
            set_class(
                module, swapped_class(type(module), EditedLinear)
            )  # first, for only this can fail
        module.add_module(NAME, self)

    def detach(self, module: nn.Module) -> None:
        if not isinstance(module, EditedLinear) or module._modules.get(NAME) is not self:
            return
        del module._modules[NAME]
        if on_top(module):  # else another library has subclassed ours since
            set_class(module, host_class(module))


class EditedLinear(Swapped):
    """Mixed in front of a linear layer: the edit of what it reads, then its own forward."""

    def edits(self) -> Iterator[Edit]:
        edit = self._modules.get(NAME)  # type: ignore[attr-defined]
        if edit is not None:
            yield edit

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for edit in self.edits():
            x = edit(x)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


def check_linear(module: nn.Module, layer: int) -> None:
    """Raise `UnsupportedModel` if what this linear layer reads cannot be edited."""
    check_swappable(module, f"the second linear layer of the MLP of block {layer}")
    if isinstance(module, Swapped) and not isinstance(module, EditedLinear):
        raise UnsupportedModel(
            f"model: the second linear layer of the MLP of block {layer} is the block or its"
            " attention; register an adapter whose mlp_out() names the layer itself."
        )
