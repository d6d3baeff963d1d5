"""Reading the hidden state at the ends of blocks while a model runs, by edits that only look."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.surgery.block import BlockEdit, check_block
from biassurgery.surgery.edit import Place, attached


class Observer(BlockEdit):
    """Hands a block's hidden state (B, T, D) to `see(layer, hidden)` and returns it unchanged."""

    watches = True

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


def observers(
    host: Host,
    see: Callable[[int, Tensor], None],
    at: Literal["input", "output"] = "output",
    layers: Iterable[int] | None = None,
) -> list[Place]:
    """An observer on each of the layers; None: on all.

    Raises:
        UnsupportedModel: the class of a block does not decide how it runs.
    """
    places = []
    for layer in range(len(host.blocks)) if layers is None else layers:
        check_block(host.blocks[layer], layer)
        places.append(Place(layer, host.blocks[layer], Observer(layer, host.layout, see, at)))
    return places


def check_ran(host: Host, layers: Collection[int]) -> list[int]:
    """The blocks that are not among the layers that were seen, for they run only with images.

    Raises:
        UnsupportedModel: another block did not run.
    """
    missing = [layer for layer in range(len(host.blocks)) if layer not in layers]
    if not set(missing) <= set(host.adapter.only_with_images(host.model)):
        raise UnsupportedModel(
            f"model: blocks {missing} did not run; layers that are skipped at random cannot be"
            " measured."
        )
    return missing


@contextmanager
def observed(host: Host, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the block, `see(layer, hidden)` gets each block output (B, T, D), patches included."""
    with attached(observers(host, see)):
        yield
