"""What comes in kinds (modes, explicit biases, quantities, statistics), known by being defined.

That holds for this library and for any other package.

The base of the kinds hands each of its subclasses to a `Kinds`:

    MODES: Kinds[Mode] = Kinds("mode", "name")

    class Mode(ABC):
        def __init_subclass__(cls, **options):
            super().__init_subclass__(**options)
            MODES.add(cls)

An installed package names its modules under the entry-point group `biassurgery.extensions`; they
are imported when a name is looked up that is not known yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from biassurgery.errors import BadOption, SurgeryError, warn

EXTENSIONS = "biassurgery.extensions"
Kind = TypeVar("Kind")


class Kinds(Mapping[str, type[Kind]]):
    """The classes of one sort of thing by their names, in order of definition.

    Args:
        argument: what a name is given as, for messages.
        attribute: the class attribute that holds the name.
        error: what an unknown name raises.
    """

    def __init__(
        self, argument: str, attribute: str, error: type[SurgeryError] = BadOption
    ) -> None:
        self.argument = argument
        self.attribute = attribute
        self.error = error
        self._classes: dict[str, type[Kind]] = {}

    def add(self, cls: type[Kind]) -> None:
        """Make a class known, if it sets a name of its own; a base without one is not a kind.

        The same module and qualified name again (a notebook cell that is run twice, the second
        class that `dataclass(slots=True)` makes) replaces.

        Raises:
            BadOption: the name is no identifier or another class has it, or methods are missing.
        """
        name = vars(cls).get(self.attribute)
        if name is None:
            return
        if not isinstance(name, str) or not name.isidentifier():
            raise BadOption(
                f"{self.attribute}: {name!r} of {path_of(cls)}; give it a name of letters, digits"
                " and underscores."
            )
        missing = _abstract_methods(cls)
        if missing:
            raise BadOption(
                f"{self.attribute}: {name!r}, but {path_of(cls)} lacks the methods"
                f" {', '.join(missing)}; define them."
            )
        holder = self._classes.get(name)
        if holder is not None and not _is_again(cls, holder):
            raise BadOption(
                f"{self.attribute}: {name!r} of {path_of(cls)} is taken by {path_of(holder)}; give"
                " it another name."
            )
        self._classes[name] = cls

    def defined(self) -> dict[str, type[Kind]]:
        """What is known so far, without looking for installed extensions."""
        return dict(self._classes)

    def find(self, name: object, otherwise: str = "") -> type[Kind]:
        """The class of a name.

        Args:
            name: as a caller gave it.
            otherwise: what else may be given, as the end of a sentence.

        Raises:
            SurgeryError: the error of these kinds, which says what is known.
        """
        if isinstance(name, str) and name in self:
            return self[name]
        raise self.error(
            f"{self.argument}: {name!r} is not known; use one of"
            f" {', '.join(map(repr, self))}{otherwise}."
        )

    def __getitem__(self, name: str) -> type[Kind]:
        if name not in self._classes:
            load_extensions()
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        load_extensions()
        return iter(self._classes)

    def __len__(self) -> int:
        load_extensions()
        return len(self._classes)


def names_in(argument: str, given: object, kinds: Mapping[str, Any]) -> tuple[Any, ...]:
    """One name or several, as a caller gave them; `Kinds.find` tells whether each is known.

    Raises:
        BadOption: it is neither a string nor a sequence.
    """
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable):
        raise BadOption(
            f"{argument}: {given!r}; give one or more of {', '.join(map(repr, kinds))}."
        )
    return tuple(given)


def path_of(cls: type) -> str:
    """Where a class is defined: its module and qualified name."""
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def load_extensions() -> None:
    """Import, once, what packages name under `biassurgery.extensions`; it registers itself."""
    load_entry_points(EXTENSIONS, "what it defines is not known")


def load_entry_points(
    group: str, consequence: str, use: Callable[[Any], object] | None = None
) -> None:
    """Load what installed packages name under a group. A broken one warns and stops no other.

    Args:
        group: of entry points.
        consequence: what is missing if one cannot be loaded, for the warning.
        use: is called with each loaded object; None: loading it is all.
    """
    for point in entry_points(group=group):
        try:
            loaded = point.load()
            if use is not None:
                use(loaded)
        except Exception as error:  # noqa: BLE001 another package's import may raise anything
            warn(
                f"the entry point {point.name} = {point.value} of {group} cannot be loaded"
                f" ({error!r}); {consequence}.",
            )


def _is_again(cls: type, before: type) -> bool:
    """Whether a class is another one defined once more.

    `dataclass(slots=True)` gives its second class the qualified name only when it is made: until
    then a class inside a function, `f.<locals>.Mode`, is called `Mode`.
    """
    return path_of(cls) == path_of(before) or (
        cls.__module__ == before.__module__
        and before.__qualname__.endswith(f".<locals>.{cls.__qualname__}")
    )


def _abstract_methods(cls: type) -> list[str]:
    """The names of `inspect.isabstract`, which are not set yet while a class is being defined."""
    names = {name for base in cls.__mro__ for name in vars(base)}
    return sorted(
        name for name in names if getattr(getattr(cls, name, None), "__isabstractmethod__", False)
    )
