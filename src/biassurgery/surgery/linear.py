"""How a linear layer is changed: edits of what it reads, its own forward, edits of its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.edit import Edit
from biassurgery.surgery.swap import Swapped, check_swappable


class EditedLinear(Swapped):
    """Mixed in front of a linear layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for edit in self.children_of(InputEdit):
            x = edit(x)
        instead = self.children_of(Replacement)
        y = instead[-1](x) if instead else super().forward(x, *args, **kwargs)
        for edit in self.children_of(OutputEdit):
            y = edit(x, y)
        return y


class InputEdit(Edit):
    """Changes or watches what a linear layer reads (..., D)."""

    child = "input_edit"
    several = True
    mixin = EditedLinear

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # abstract


class Replacement(Edit):
    """Computes (..., N) from what a linear layer reads (..., D), in its place."""

    child = "replacement"
    several = True
    mixin = EditedLinear

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # abstract


class OutputEdit(Edit):
    """Changes or watches what a linear layer returns (..., N), given what it read (..., D)."""

    child = "output_edit"
    several = True
    mixin = EditedLinear

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError  # abstract


def check_linear(module: nn.Module, layer: int) -> None:
    """Raise `UnsupportedModel` if what this linear layer reads cannot be edited."""
    check_swappable(module, f"the second linear layer of the MLP of block {layer}")
    if isinstance(module, Swapped) and not isinstance(module, EditedLinear):
        raise UnsupportedModel(
            f"model: the second linear layer of the MLP of block {layer} is the block or its"
            " attention; register an adapter whose mlp_out() names the layer itself."
        )
