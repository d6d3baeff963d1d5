"""Measuring on several ranks of `torch.distributed`: their sums, and their failures.

with taking_part("calibrate", model, group) as ranks:
    ...                                         # an error here is told to the other ranks
    for batch in ranks.apart(batches): ...      # refused if two of them read the same data
    return ranks.total(found)                   # the same on all
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial, reduce
from itertools import chain, combinations, islice
from operator import add
from typing import Any, TypeVar

from torch import nn

from biassurgery.adapters.registry import find_root
from biassurgery.adapters.sharing import Group, Sharing, everybody, sharing
from biassurgery.errors import BadBatch, BadOption, RankFailed
from biassurgery.measure.exchange import Exchange
from biassurgery.measure.fingerprint import digest_of, patches_in

Value = TypeVar("Value")
_Read = tuple[tuple[int, ...], list[bytes]]  # who reads together, and the first they read
_FIRST = 2  # batches by which data are told apart
_NEXT_STEP = (
    "give each its own share, by sampler=torch.utils.data.DistributedSampler(dataset,"
    " shuffle=False) in a DataLoader, or by itertools.islice(batches, rank, None, world) of an"
    " iterable; or pass group=False, and every rank measures for itself"
)


class Ranks:
    """The ranks that take part in one call, as one of them sees it.

    Args:
        shared: who they are; None: this rank is alone.
        exchange: the call; None: this rank is alone.
    """

    def __init__(self, shared: Sharing | None, exchange: Exchange | None) -> None:
        self.shared = shared
        self.exchange = exchange

    @property
    def alone(self) -> bool:
        """Whether this rank's data are all data."""
        return self.exchange is None

    def total(self, value: Value, plus: Callable[[Any, Any], Any] = add) -> Value:
        """The sum over all data, the same on all ranks.

        Of ranks that run one model together, and so read the same data, one counts.
        """
        if self.shared is None or self.exchange is None:
            return value
        counts = min(set(self.shared.ranks) & set(self.shared.together)) == self.exchange.rank

        def sum_of(parts: dict[int, list[Value]]) -> Value:
            return reduce(plus, [value for part in parts.values() for value in part])

        return self.exchange.agree([value] if counts else [], sum_of)

    def same(self, **options: Any) -> None:
        """Raise `BadOption` on all ranks unless these options are the same on all."""
        self.check({name: repr(value) for name, value in options.items()}, _check_same)

    def apart(self, batches: Iterator[Value]) -> Iterator[Value]:
        """The batches, unless ranks are found to read the same ones by the first of them.

        The first are compared before any is handed on.

        Raises:
            BadBatch: ranks whose sums would count the same data twice; ranks that run one model
                together and do not read the same data; a rank that has no batch.
        """
        return self._compared(batches, _check_apart)

    def alike(self, batches: Iterator[Value], argument: str) -> Iterator[Value]:
        """The batches, unless ranks are found to read different ones by the first of them.

        Raises:
            BadBatch: they do; a rank that has no batch.
        """
        return self._compared(batches, partial(_check_alike, argument))

    def check(self, value: Any, how: Callable[[dict[int, Any]], None]) -> None:
        """Let one rank look at the values by rank; what it raises is raised on all."""
        if self.exchange is not None:
            self.exchange.agree(value, how)

    def by_one(self, do: Callable[[], Value]) -> Value:
        """What `do` returns on the lowest rank, where alone it is called, once it is done there.

        What it raises there the others hear of as `RankFailed`.
        """
        if self.exchange is None:
            return do()
        lowest = self.exchange.ranks[0]
        done = do() if self.exchange.rank == lowest else None
        return self.exchange.agree(done, lambda answers: answers[lowest])

    def _compared(
        self, batches: Iterator[Value], how: Callable[[dict[int, Any]], None]
    ) -> Iterator[Value]:
        if self.shared is None or self.exchange is None:
            yield from batches
            return
        first = list(islice(batches, _FIRST))
        if not first:
            raise BadBatch(
                f"batches: there are none on rank {self.exchange.rank}; give every rank at least"
                " one, or name those that have some by group=."
            )
        self.check((self.shared.together, [digest_of(batch) for batch in first]), how)
        yield from chain(first, batches)


_innermost: ContextVar[Ranks | None] = ContextVar("biassurgery_ranks", default=None)
# the innermost call that this rank makes with others, of whatever kind
_around: ContextVar[Exchange | None] = ContextVar("biassurgery_exchange", default=None)


@contextmanager
def taking_part(verb: str, model: Any, group: Group = None) -> Iterator[Ranks]:
    """One call that ranks make together; an error in the block is told to those that wait.

    Args:
        verb: the name of the call.
        model: what is measured, which may know the ranks: see `sharing`.
        group: a `ProcessGroup`, False for this rank alone, None: as the call has it in which this
            one is made, and if it is made in none, as the model has it.

    Raises:
        RankFailed: another rank has failed, or does not answer.
    """
    outer = _innermost.get()
    try:
        shared = outer.shared if outer is not None and group is None else sharing(model, group)
    except BaseException as error:
        # Who takes part is not known, and mostly it is everybody.
        _tell(_exchange(verb, everybody(group)), error)
        raise
    ranks = Ranks(shared, _exchange(verb, shared))
    token = _innermost.set(ranks)
    try:
        with calling(ranks.exchange):
            if not ranks.alone and isinstance(model, nn.Module):
                ranks.same(patches=patches_in(find_root(model)))
            yield ranks
    finally:
        _innermost.reset(token)


@contextmanager
def calling(exchange: Exchange | None) -> Iterator[None]:
    """The length of a call that ranks make together; an error in the block is told to the others.

    Args:
        exchange: the call; None: this rank makes it alone.
    """
    token = _around.set(exchange)
    try:
        with nullcontext() if exchange is None else exchange.alive():
            try:
                yield
            except BaseException as error:
                _tell(exchange, error)
                raise
    finally:
        _around.reset(token)


def enclosing(ranks: tuple[int, ...]) -> Exchange | None:
    """The innermost call that is being made in which all of these ranks take part."""
    call = _around.get()
    while call is not None and not set(ranks) <= set(call.ranks):
        call = call.outer
    return call


def ranks_of_this_call() -> Ranks:
    """Those of the innermost call that is being made; of none: this rank alone."""
    return _innermost.get() or Ranks(None, None)


def is_in_own_call() -> bool:
    """Whether this rank makes the innermost call for itself alone, as by `group=False`."""
    innermost = _innermost.get()
    return innermost is not None and innermost.alone


def _exchange(verb: str, shared: Sharing | None) -> Exchange | None:
    return None if shared is None else Exchange(verb, shared.ranks, enclosing(shared.ranks))


def _tell(exchange: Exchange | None, error: BaseException) -> None:
    if exchange is not None:
        with suppress(RankFailed):  # nobody can be told any more; the error itself says more
            exchange.tell(error)


def _check_same(answers: dict[int, dict[str, str]]) -> None:
    (first, options), *others = answers.items()
    for rank, other_options in others:
        for name, value in options.items():
            if other_options[name] != value:
                raise BadOption(
                    f"{name}: {value} on rank {first} and {other_options[name]} on rank {rank};"
                    " give the same on all ranks."
                )


def _check_apart(answers: dict[int, _Read]) -> None:
    """Refuse data that count twice, and parts of one model that read different ones."""
    for rank, other in combinations(answers, 2):
        together, first = answers[rank]
        _, others_first = answers[other]
        if other in together:
            if first != others_first:
                raise BadBatch(
                    f"batches: ranks {rank} and {other} run one model together, so they have to"
                    " read the same batches, and theirs differ; give both the same, or say by"
                    " group= which ranks have data of their own."
                )
        elif all(one == another for one, another in zip(first, others_first)):
            raise BadBatch(
                f"batches: ranks {rank} and {other} read the same data, which would count twice;"
                f" {_NEXT_STEP}."
            )


def _check_alike(argument: str, answers: dict[int, tuple[tuple[int, ...], list[bytes]]]) -> None:
    """Refuse data that every rank has to read as a whole, if they differ."""
    for rank, other in combinations(answers, 2):
        if answers[rank][1] != answers[other][1]:
            raise BadBatch(
                f"{argument}: ranks {rank} and {other} read different data, but every rank needs"
                " all of them; give all ranks the same batches in the same order, or pass"
                " group=False."
            )
