"""How this library reads a model: what holds for every pass over data, written once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import Lock, get_ident
from typing import TypeVar

import torch
from torch import nn

from biassurgery.errors import ModelInUse
from biassurgery.measure.progress import count_of, with_lines

Item = TypeVar("Item")
_readers: list[tuple[int, frozenset[nn.Module]]] = []  # threads, and the modules that they read
_begins = Lock()


@contextmanager
def reading(model: nn.Module, *, eager: bool = True) -> Iterator[None]:
    """Within the block the model runs without gradients and in evaluation mode.

    Afterwards every module has its own mode again. One thread at a time reads a model.

    Args:
        model: the model.
        eager: whether compiled code is left out meanwhile, so that edits of the modules take
            effect without a new compilation; an evaluation, which edits nothing, runs what its
            user has compiled.

    Raises:
        ModelInUse: another thread reads it.
    """
    with ExitStack() as undo:
        undo.enter_context(_alone(model))
        training = [module for module in model.modules() if module.training]
        undo.enter_context(torch.no_grad())
        if eager:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            try:
                model.eval()
                yield
            finally:
                _train(training)
        except BaseException:  # an interruption may have come before they all train again
            _train(training)
            raise


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Within the block no other thread may begin to read the model."""
    reader: list[tuple[int, frozenset[nn.Module]]] = []
    try:
        with _begins:
            check_unread(model)
            reader.append((get_ident(), frozenset(model.modules())))
            _readers.extend(reader)
        yield
    finally:
        for one in reader:
            with suppress(ValueError):  # interrupted before it was there
                _readers.remove(one)


def check_unread(model: nn.Module) -> None:
    """Raise `ModelInUse` if another thread reads the model, or one that it shares modules with."""
    others = [modules for thread, modules in tuple(_readers) if thread != get_ident()]
    # The model itself first: while another thread puts its observers on, it cannot be gone through.
    if any(model in modules or not modules.isdisjoint(model.modules()) for modules in others):
        raise ModelInUse(
            f"model: another thread is measuring this {type(model).__name__} (calibrate, detect,"
            " perplexity or the like), which is one thread's at a time; wait until it is done, or"
            " give each thread a copy.deepcopy(model) of its own."
        )


def _train(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.training = True


def with_bar(
    items: Iterable[Item],
    name: str,
    progress: bool | None,
    total: int | None = None,
    unit: str = "batch",
) -> Iterator[Item]:
    """The items behind a progress bar.

    Args:
        items: in order.
        name: of the pass.
        progress: whether a bar is shown; None: on a terminal, and elsewhere a line now and then.
        total: how many there are; None: what `len` says, if it says something.
        unit: what one of them is.
    """
    from tqdm.auto import tqdm

    if progress is None and not sys.stderr.isatty():
        return with_lines(items, name, count_of(items) if total is None else total, unit)
    return iter(tqdm(items, desc=name, unit=unit, disable=progress is False, total=total))
