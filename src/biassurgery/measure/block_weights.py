"""The weights of a model that are elsewhere, by block, and how they come and go with its turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from biassurgery.adapters.offloaded import Hooked, brought, offloaded_in, resting
from biassurgery.adapters.registry import Host


class BlockWeights(NamedTuple):
    """What accelerate has offloaded: of each block, of what is around them, and of the head."""

    of_block: list[list[Hooked]]
    others: list[Hooked]
    head: list[Hooked]

    @classmethod
    def of(cls, host: Host) -> BlockWeights:
        """Those of a model."""
        of_block = [offloaded_in(block) for block in host.blocks]
        seen = {module for hooked in of_block for module, _ in hooked}

        def further(root: nn.Module) -> list[Hooked]:
            found = [one for one in offloaded_in(root) if one[0] not in seen]
            seen.update(module for module, _ in found)
            return found

        return cls(of_block, further(host.adapter.body(host.model)), further(host.model))

    @contextmanager
    def around(self) -> Iterator[None]:
        """Within the block those around the blocks are there, and no forward brings others.

        The head comes and goes as ever, with forwards that reach it.
        """
        with resting([one for hooked in (self.others, *self.of_block) for one in hooked]):  # noqa: SIM117
            with brought(self.others):
                yield

    @contextmanager
    def at(self, layer: int, *, with_head: bool = False) -> Iterator[None]:
        """Within the block those of one block are there, and with the last one those of the head.

        Args:
            layer: the block.
            with_head: whether several forwards will go on to the head, behind the last block.
        """
        is_last = layer == len(self.of_block) - 1
        head = self.head if with_head and is_last else []
        with resting(head), brought([*self.of_block[layer], *head]):
            yield
