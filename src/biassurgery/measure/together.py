"""Ranks that run one model together: those of tensor parallelism, and those of FSDP2.

In the collectives of such a model a rank waits for all others, for as long as the process group's
time-out says. So before they go into one they tell each other, by the store, that they have come so
far: who has failed on the way there is heard of at once.

    with together("save_patch", model) as ranks:
        ...                                 # an error here is told to the other ranks
        ranks.same(folder=name)             # all are ready
        whole = gathered(parameter)         # a collective

    for batch in in_step(batches, model):   # every rank has one
        model(batch)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from biassurgery.adapters.sharing import Sharing, needed_ranks
from biassurgery.errors import BadBatch
from biassurgery.measure.exchange import Exchange
from biassurgery.measure.ranks import Ranks, calling, enclosing, is_in_own_call

Item = TypeVar("Item")
_ENDED = object()


@contextmanager
def together(verb: str, model: Any) -> Iterator[Ranks]:
    """One call that all ranks make that run a model with this one.

    An error in the block is told to the others. Where a rank runs the model by itself, or makes the
    call inside one that is its own (`group=False`), it is alone and nothing is exchanged.

    Args:
        verb: the name of the call.
        model: as a user gave it, be it a model or not.

    Raises:
        RankFailed: another rank has failed, or does not answer.
    """
    needed = _needed(model)
    exchange = Exchange(verb, needed, enclosing(needed)) if needed else None
    with calling(exchange):
        yield Ranks(Sharing(needed, needed) if needed else None, exchange)


def in_step(batches: Iterable[Item], model: nn.Module) -> Iterator[Item]:
    """The batches, each as soon as all ranks that run the model with this one have theirs.

    A rank whose loader fails, or that has fewer batches, is so heard of before the others wait for
    it in a forward. Where a call is this rank's alone nothing is exchanged.

    Args:
        batches: as they go into the model, checked.
        model: that runs them.

    Raises:
        RankFailed: another rank has failed, or does not answer.
        BadBatch: some ranks have a batch, and some have none left.
    """
    exchange = _of_forwards(model)
    return iter(batches) if exchange is None else _in_step(iter(batches), exchange)


def anywhere(here: bool, model: nn.Module) -> bool:
    """Whether something is so on any of the ranks that run the model with this one.

    For a forward that is made where it is: all of them have to make it.
    """
    exchange = _of_forwards(model)
    return here if exchange is None else exchange.agree(here, lambda said: any(said.values()))


def _in_step(batches: Iterator[Item], exchange: Exchange) -> Iterator[Item]:
    while True:
        batch: Any = next(batches, _ENDED)
        exchange.agree(batch is not _ENDED, _check_even)
        if batch is _ENDED:
            return
        yield batch


def _check_even(has: dict[int, bool]) -> None:
    if len(set(has.values())) > 1:
        ended = [rank for rank, one in has.items() if not one]
        raise BadBatch(
            f"batches: of the ranks {list(has)}, which run one model together, {ended} have none"
            " left while the others have, and each forward needs all of them; give every rank as"
            " many batches."
        )


def _of_forwards(model: nn.Module) -> Exchange | None:
    """For the forwards within the innermost call, among those ranks of it that run the model."""
    around = enclosing(())
    if around is None:
        return None
    needed = tuple(rank for rank in needed_ranks(model) if rank in around.ranks)
    return Exchange(around.verb, needed, around) if len(needed) > 1 else None


def _needed(model: Any) -> tuple[int, ...]:
    if is_in_own_call() or not isinstance(model, nn.Module):
        return ()
    return needed_ranks(model)
