"""A config of a model's own, where siblings may share the one that it has."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn


class Held(NamedTuple):
    """A module, by name, that holds a config or a part of one, in an attribute."""

    module: str
    attribute: str
    config: Any


def configs_in(model: nn.Module) -> list[Held]:
    """Where the model's config, and each part of it, is held."""
    config: Any = getattr(model, "config", None)
    known = {id(part) for part, _ in _parts(config, config)}
    return [
        Held(name, attribute, value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if id(value) in known
    ]


def give_own(model: nn.Module, held: list[Held]) -> None:
    """Put a copy of its config in each of the places that `configs_in` found."""
    config: Any = getattr(model, "config", None)
    own = {id(old): new for old, new in _parts(config, copy.deepcopy(config))}
    put(model, [place._replace(config=own[id(place.config)]) for place in held])


def put(model: nn.Module, held: list[Held]) -> None:
    """Put configs where they are held."""
    for name, attribute, config in held:
        setattr(model.get_submodule(name), attribute, config)


def _parts(old: Any, new: Any) -> Iterator[tuple[Any, Any]]:
    """A config and a copy of it, and each config that is a part of these."""
    if hasattr(old, "to_dict"):
        yield old, new
        for name, value in vars(old).items():
            yield from _parts(value, getattr(new, name))
