"""Classes that are known by a name, from whatever package they come."""

from __future__ import annotations

from typing import Generic, TypeVar

from biassurgery.errors import BadOption

Kind = TypeVar("Kind", bound=type)


class Registered(Generic[Kind]):
    """The classes of one kind by name.

    Args:
        argument: what they are chosen by, for messages.
    """

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.classes: dict[str, Kind] = {}

    def add(self, cls: Kind) -> None:
        """Make a class known, if it has a name of its own; the same one again replaces the first.

        Raises:
            BadOption: another class has this name.
        """
        name = vars(cls).get("name")
        if name is None:
            return
        known = self.classes.get(name)
        if known is not None and _full_name(known) != _full_name(cls):
            raise BadOption(
                f"name: {name!r} of {_full_name(cls)} is taken by {_full_name(known)}; choose"
                " another."
            )
        self.classes[name] = cls

    def __getitem__(self, name: str) -> Kind:
        if name not in self.classes:
            raise BadOption(
                f"{self.argument}: {name!r} is not known; use one or more of"
                f" {', '.join(self.classes)}."
            )
        return self.classes[name]


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
