"""Finding the parts of a host model by where they may be."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from biassurgery.errors import UnsupportedModel


def first_of(model: nn.Module, paths: Iterable[str], what: str) -> nn.Module:
    """The first of several submodules that a model has.

    Versions of a library and wrappers of a model differ in where it is.

    Raises:
        UnsupportedModel: it has none of them.
    """
    for path in paths:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise UnsupportedModel(
        f"model: {type(model).__name__} has {what} in none of the places {', '.join(paths)};"
        " register an adapter that says where."
    )
