"""Classes that are known by a name, from whatever package they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from biassurgery.errors import BadOption

Kind = TypeVar("Kind")


class Kinds(Generic[Kind]):
    """The classes of one sort of thing by their names, in order of definition.

    Args:
        argument: what a name is given as, for messages.
        attribute: the class attribute that holds the name.
    """

    def __init__(self, argument: str, attribute: str) -> None:
        self.argument = argument
        self.attribute = attribute
        self._classes: dict[str, type[Kind]] = {}

    def add(self, cls: type[Kind]) -> None:
        """Make a class known, if it sets a name of its own; the same one again replaces.

        Raises:
            BadOption: another class has this name.
        """
        name = vars(cls).get(self.attribute)
        if name is None:
            return
        holder = self._classes.get(name)
        if holder is not None and path_of(holder) != path_of(cls):
            raise BadOption(
                f"{self.attribute}: {name!r} of {path_of(cls)} is taken by {path_of(holder)}; give"
                " it another name."
            )
        self._classes[name] = cls

    def find(self, name: str) -> type[Kind]:
        """The class of a name, or `BadOption`."""
        if name in self._classes:
            return self._classes[name]
        raise BadOption(
            f"{self.argument}: {name!r} is not known; use one of"
            f" {', '.join(map(repr, self._classes))}."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)


def path_of(cls: type) -> str:
    """Where a class is defined: its module and qualified name."""
    return f"{cls.__module__}.{cls.__qualname__}"
