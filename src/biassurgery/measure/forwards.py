"""Single forwards that go through a model one block at a time, beside the data.

What is verified or confirmed on one sequence takes several forwards of the whole model. Where its
weights are brought block by block, each of these goes through a block while the block is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor

from biassurgery.adapters.arguments import call
from biassurgery.adapters.devices import block_device
from biassurgery.adapters.registry import Host
from biassurgery.errors import UnsupportedModel
from biassurgery.measure.continued import cached_arguments, caches
from biassurgery.surgery.edit import Place, attached
from biassurgery.surgery.step import Step, Through


class Forward:
    """One forward of a model, which has come as far as some block.

    Args:
        host: the model.
        run: calls it.
        places: the edits that are on it meanwhile; more may be added until the turn of their block.
        caching: whether it fills a cache of keys and values.

    Attributes:
        before: what the block before the latest one has returned; None: there is none before it.
        hidden: what the latest block has returned; None: none has run.
        output: what the model has returned; None: it has not come to its end.
        cache: the one that the latest block was given; None: none.
    """

    def __init__(
        self,
        host: Host,
        run: Callable[[], Any],
        places: Sequence[Place] = (),
        caching: bool = False,
    ) -> None:
        self.host = host
        self.run = run
        self.places = places
        self.before: Tensor | None = None
        self.hidden: Tensor | None = None
        self.output: Any = None
        self.cache: Any = None
        self._step = Step(caching)

    def through(self, layer: int) -> None:
        """Go through one block, whose weights are there, and behind the last one to the end.

        Raises:
            UnsupportedModel: the block cannot be run without the others.
        """
        blocks = self.host.blocks
        step = self._step
        self.before = self.hidden
        kept = None if self.hidden is None else self.hidden.to(block_device(blocks[layer]))
        step.begin(layer, kept, is_first=True, is_last=layer == len(blocks) - 1)
        here = [place for place in self.places if place.layer in (None, layer)]
        with attached([*here, *step.places(blocks)]), suppress(Through):
            self.output = self.run()
        self.cache = step.cache
        self.hidden = step.take()

    def branch(self, places: Sequence[Place]) -> Forward:
        """The same forward as it was before the latest block, with other edits from there on."""
        other = Forward(self.host, self.run, places)
        other.hidden = self.before
        other._step.forms = dict(self._step.forms)
        return other


class Continued:
    """Forwards that continue a cache, see `continued`, one block at a time.

    A forward asks its cache how long the sequence is before the first block runs, and by then that
    block has read all chunks. So each chunk has a cache of its own, in which every block up to the
    latest one holds what is before that chunk, and which the next block gets a copy of.

    Args:
        host: the model.
        chunks: the arguments of the forwards.
        places: the edits that are on the model meanwhile; may be added to.
    """

    def __init__(
        self, host: Host, chunks: Sequence[Mapping[str, Any]], places: Sequence[Place]
    ) -> None:
        self.host = host
        self.chunks = chunks if caches(host) else chunks[:1]
        # Also a single one may fill a cache, which nothing continues then.
        self.forwards = [
            Forward(host, partial(self._run, index), places, caching=True)
            for index in range(len(self.chunks))
        ]
        self._before: list[Any] = [None for _ in self.chunks]
        self._given: Any = None

    def _run(self, index: int) -> Any:
        chunk = self.chunks[index]
        if len(self.chunks) == 1:
            return call(self.host.model, chunk)
        read = self.chunks[index - 1]["attention_mask"].shape[1] if index else 0
        return call(
            self.host.model, {**chunk, **cached_arguments(self.host, chunk, self._given, read)}
        )

    def through(self, layer: int) -> None:
        """Let each chunk go through one block, see `Forward`."""
        for index, forward in enumerate(self.forwards):
            self._given = copy.deepcopy(self._before[index])
            lengths = _lengths(self._given)
            forward.through(layer)
            if index + 1 < len(self.forwards):
                self._hand_on(index, layer, forward.cache, lengths)

    def _hand_on(self, index: int, layer: int, cache: Any, lengths: list[int]) -> None:
        """Let the next chunk find what this one has put into its cache."""
        after = self._before[index + 1]
        if after is None:
            after = self._before[index + 1] = cache
        if not hasattr(cache, "layers") or vars(cache).keys() != vars(after).keys():
            raise UnsupportedModel(
                f"model: block {layer} of {type(self.host.model).__name__} keeps more in a cache"
                " than its own keys and values, or keeps none there, so that a sequence which"
                " continues one cannot be run block by block; leave onload= out."
            )
        before = [*lengths, *(0 for _ in cache.layers)]
        for at, (part, length) in enumerate(zip(cache.layers, _lengths(cache))):
            if at >= len(after.layers):
                after.layers.append(part)
            elif length != before[at]:
                after.layers[at] = part

    @property
    def outputs(self) -> list[Any]:
        """What the model has returned for each chunk."""
        return [forward.output for forward in self.forwards]


def _lengths(cache: Any) -> list[int]:
    """How many tokens each layer of a cache holds."""
    return [int(part.get_seq_length()) for part in getattr(cache, "layers", ())]
