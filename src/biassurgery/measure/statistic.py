"""What is counted while a model reads data: one class a statistic, ours and other packages'."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from biassurgery.adapters.registry import Host
from biassurgery.errors import BadOption
from biassurgery.findings.sums import Sums
from biassurgery.kinds import Kinds, path_of
from biassurgery.measure.ranks import Ranks
from biassurgery.surgery.edit import Place


@dataclass(frozen=True, eq=False)
class BlockOutput:
    """What one block returned for one batch, on its own device.

    Attributes:
        layer: 0-based index of the block.
        hidden: (B, T, D) the residual stream, in the model's dtype.
        magnitude: (B, T, D) its absolute values, 0 at padding.
        median: (B,) the exact median magnitude of each sequence's real tokens.
        threshold: (B,) the magnitude beyond which a value of the sequence is massive: by default
            the larger of 100 and 1000 times the median (Sun et al. 2024, section 2).
        roles: (B, T) int64, the index in `host.roles` of every token's role; -1 at padding.
        real: (B, T) bool, False at padding.
    """

    layer: int
    hidden: Tensor
    magnitude: Tensor
    median: Tensor
    threshold: Tensor
    roles: Tensor
    real: Tensor

    @cached_property
    def peak(self) -> Tensor:
        """(B, D) float32, the largest magnitude of each channel of a sequence."""
        return self.magnitude.amax(1).float()

    @cached_property
    def massive(self) -> tuple[Tensor, Tensor]:
        """The channels (C,) int64 with a massive value; and (B, T, C) bool, which values are."""
        channels = (self.peak > self.threshold[:, None]).any(0).nonzero()[:, 0]
        return channels, self.magnitude[..., channels].float() > self.threshold[:, None, None]


class Statistic(ABC):
    """Something that `detect` counts in its pass over data.

    Subclass it and give it a `name`, by which `detect(model, batches, statistics=(name,))` then
    finds it. All that is counted is in `totals`: that is what two statistics add up (`a + b`), and
    what the ranks of `torch.distributed` do. `Sums` serves for most; anything with `+` will do.

    Attributes:
        name: what it is asked for by, and the key of its result in `Detection.statistics`.
        in_batch: for `onload="blocks"`, where all batches go through one block before the next:
            the attributes in which it keeps what it knows of the batch at hand from one block to
            the next. Those that `begin` sets and nothing changes need not be named. None: it does
            not say, and is refused there.
        host: the model as its adapter sees it: `host.blocks`, `host.width`, `host.roles`.
        totals: a fresh `Sums`; a subclass may put something else in its place.
    """

    name: ClassVar[str]
    in_batch: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, host: Host) -> None:
        self.host = host
        self.totals: Any = Sums()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        STATISTICS.add(cls)

    def places(self) -> Sequence[Place]:
        """Further observers that are on the model during the pass, for example on attentions."""
        return ()

    def begin(self, batch: Mapping[str, Any]) -> None:  # noqa: B027  # may be left out
        """A batch is about to be read: the arguments of the model, on its device."""

    @abstractmethod
    def see(self, output: BlockOutput) -> None:
        """Take what a block returned; called once for each block and batch, as the blocks run."""

    def end(self) -> None:  # noqa: B027  # may be left out
        """The batch has been read, and all its block outputs are finite."""

    def state(self) -> Any:
        """What is counted so far, for a checkpoint: `totals`, if these are a dict.

        A statistic that has more in it than what it was made with, or totals of another kind, says
        here and in `restore` what of that is counted: numbers, texts, tensors, and tuples, lists
        and dicts of them.
        """
        return self.totals

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave; tensors come back on the CPU, every mapping as a dict."""
        self.totals = type(self.totals)(state)

    def suspend(self) -> Any:
        """What it knows of the batch at hand, before another batch goes through the same block.

        Values as in `state`, for they may have to wait in a file.
        """
        return {name: getattr(self, name) for name in self.in_batch or ()}

    def resume(self, known: Any) -> None:
        """Go on with a batch, behind `begin`, from what `suspend` gave."""
        for name in self.in_batch or ():
            setattr(self, name, known[name])

    @abstractmethod
    def result(self) -> Any:
        """What has been found, from `totals`."""

    def __add__(self, other: Statistic) -> Statistic:
        """The statistic of both data sets."""
        both = copy.copy(self)
        both.totals = self.totals + other.totals
        return both


STATISTICS: Kinds[Statistic] = Kinds("statistics", "name")


def check_states(statistics: Iterable[Statistic]) -> None:
    """Raise `BadOption` if a new statistic does not say what of it a checkpoint has to hold.

    One that has nothing but its `totals`, and what it was made with, need not.
    """
    for statistic in statistics:
        if _tells(statistic):
            continue
        options = set(inspect.signature(type(statistic)).parameters)
        others = sorted(set(vars(statistic)) - options - {"host", "totals"})
        if others:
            raise BadOption(
                f"checkpoint: the statistic {_called(statistic)} holds {', '.join(others)} besides"
                " its totals, and does not say whether that is counted; give it state() and"
                " restore(), or leave checkpoint= out."
            )
        if not isinstance(statistic.totals, dict):
            raise BadOption(
                f"checkpoint: the totals of the statistic {_called(statistic)} are a"
                f" {path_of(type(statistic.totals))}, which is no dict (Sums, Counter) that a file"
                " can hold; give it state() and restore(), or leave checkpoint= out."
            )


def check_counted(statistics: Iterable[Statistic]) -> None:
    """Raise `BadOption` if a statistic has seen a batch and left nothing for a checkpoint."""
    for statistic in statistics:
        totals = statistic.totals
        if not _tells(statistic) and isinstance(totals, Sums) and not totals:
            raise BadOption(
                f"checkpoint: the statistic {_called(statistic)} has counted nothing in its"
                " `totals`, which is what is kept; count there, give it state() and restore(), or"
                " leave checkpoint= out."
            )


def check_suspendable(statistics: Iterable[Statistic]) -> None:
    """Raise `BadOption` if a statistic does not say what it keeps of a batch between blocks."""
    for statistic in statistics:
        if statistic.in_batch is None:
            raise BadOption(
                f"onload: the statistic {_called(statistic)} does not say what it keeps of a batch"
                " from one block to the next; name these attributes in its in_batch (() if there"
                " are none), or leave onload= out."
            )


def _tells(statistic: Statistic) -> bool:
    """Whether a statistic says itself what of it is counted."""
    kind = type(statistic)
    return kind.state is not Statistic.state or kind.restore is not Statistic.restore


def add_up(ranks: Ranks, statistics: Sequence[Statistic]) -> None:
    """Let the totals of statistics be those of all ranks.

    Raises:
        BadOption: they do not add up, or there is nothing in the totals of one.
    """
    if ranks.alone:
        return
    for statistic in statistics:
        if isinstance(statistic.totals, Sums) and not statistic.totals:
            raise BadOption(
                f"statistics: {_called(statistic)} has counted nothing in its `totals`, which is"
                " what ranks add up; count there, or pass group=False."
            )

    def plus(left: list[Any], right: list[Any]) -> list[Any]:
        return [_sum(*three) for three in zip(statistics, left, right, strict=True)]

    totals = ranks.total([statistic.totals for statistic in statistics], plus)
    for statistic, total in zip(statistics, totals, strict=True):
        statistic.totals = total


def _sum(statistic: Statistic, left: Any, right: Any) -> Any:
    """The totals of two ranks added up as their statistic does."""
    one = copy.copy(statistic)
    one.totals = left
    other = copy.copy(statistic)
    other.totals = right
    try:
        return (one + other).totals
    except TypeError as error:
        raise BadOption(
            f"statistics: what {_called(statistic)} has counted on two ranks does not add up"
            f" ({error}); let its `totals` be something with +, Sums for example, or pass"
            " group=False."
        ) from error


def _called(statistic: Statistic) -> str:
    return f"{statistic.name!r} ({path_of(type(statistic))})"
