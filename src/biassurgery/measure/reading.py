"""How this library reads a model: what holds for every pass over data, written once."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")


@contextmanager
def reading(model: nn.Module, *, eager: bool = True) -> Iterator[None]:
    """Within the block the model runs without gradients and in evaluation mode.

    Afterwards every module has its own mode again.

    Args:
        model: the model.
        eager: whether compiled code is left out meanwhile, so that edits of the modules take
            effect without a new compilation; an evaluation, which edits nothing, runs what its
            user has compiled.
    """
    training = [module for module in model.modules() if module.training]
    with ExitStack() as undo:
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


def _train(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.training = True


def with_bar(items: Iterable[Item], name: str, progress: bool | None) -> Iterator[Item]:
    """The items behind a progress bar; None: only on a terminal."""
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    return iter(tqdm(items, desc=name, unit="batch", disable=not shown))
