"""Reading the output of every block while a model runs, by the same class swap that patches use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.surgery.block import BlockEdit, check
from biassurgery.surgery.edit import Place, attached


class Observer(BlockEdit):
    """Hands the hidden state to a function and returns it unchanged."""

    def __init__(
        self,
        layer: int,
        layout: str,
        see: Callable[[int, Tensor], None],
        at: Literal["input", "output"] = "output",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.layout = layout
        self.see = see
        self.at = at

    def forward(self, hidden: Tensor, start: int | Tensor = 0) -> Tensor:
        self.see(self.layer, hidden)
        return hidden


@contextmanager
def observed(host: Host, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the block, `see(layer, hidden)` is called with every block output (B, T, D), patches
    included.
    """
    with attached(observing(host, see)):
        yield


def observing(
    host: Host, see: Callable[[int, Tensor], None], at: Literal["input", "output"] = "output"
) -> list[Place]:
    """An observer on every block, ready to be attached.

    Raises:
        UnsupportedModel: the class of a block would not decide how it runs.
    """
    for layer, block in enumerate(host.blocks):
        check(block, layer)
    return [
        Place(layer, block, Observer(layer, host.layout, see, at))
        for layer, block in enumerate(host.blocks)
    ]
