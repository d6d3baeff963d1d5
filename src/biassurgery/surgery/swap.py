"""Changing how one module runs: its class becomes a subclass that mixes ours in front, one or more,
and back again.

A class swap keeps state-dict keys, `isinstance`, forward hooks and the module object itself, and
`torch.compile` sees it (a guard on the type fails and the module is compiled anew), where a forward
hook added later would be ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MethodType, new_class
from typing import TYPE_CHECKING, Any

from torch import nn

from biassurgery.errors import UnsupportedModel

if TYPE_CHECKING:
    from biassurgery.patching import Patch


class Edit(nn.Module):
    """One change of one module: a child of it while it is attached.

    Attributes:
        patch: the patch that it belongs to; None: to none, as what only observes does.
    """

    patch: Patch | None = None

    def attach(self, module: nn.Module) -> None:
        """Put this edit on a module, after those that are there."""
        raise NotImplementedError  # abstract

    def detach(self, module: nn.Module) -> None:
        """Take this edit off; with the last one the module gets its own class back."""
        raise NotImplementedError  # abstract


class Swapped:
    """Base of every mixin that is put in front of a host's class."""

    @classmethod
    def prepare(cls) -> None:
        """Make this process ready for modules of this class; called whenever one comes to be, from
        a file too.
        """

    def edits(self) -> Iterator[Edit]:
        """The edits on this module, each mixin's in order of application."""
        yield from ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(2)
        return _new_swapped, (host_class(self), *mixins(type(self))), *state


def swapped_class(cls: type[nn.Module], mixin: type[Swapped]) -> type[nn.Module]:
    """The class with one more mixin in front of its host, and of the mixins that it has already."""
    return _class(_host(cls), mixin, *mixins(cls))


def without(cls: type[nn.Module], mixin: type[Swapped]) -> type[nn.Module]:
    """The class without one of its mixins; the host itself without the last."""
    return _class(_host(cls), *(each for each in mixins(cls) if each is not mixin))


@functools.cache
def _class(host: type[nn.Module], *mixed: type[Swapped]) -> type[nn.Module]:
    """The subclass of a host's class with mixins in front.

    Its names are the host's: accelerate knows by them what it must not split, transformers what a
    model records of its outputs.
    """
    names = {"__module__": host.__module__, "__qualname__": host.__qualname__}
    return (
        new_class(host.__name__, (*mixed, host), exec_body=lambda body: body.update(names))
        if mixed
        else host
    )


def mixins(cls: type) -> tuple[type[Swapped], ...]:
    """The mixins of a class of ours; none of any other class, one that is derived from ours
    included.
    """
    *mixed, _ = cls.__bases__
    return tuple(mixed) if all(issubclass(base, Swapped) for base in mixed) else ()


def _host(cls: type[nn.Module]) -> type[nn.Module]:
    return cls.__bases__[-1] if mixins(cls) else cls


def on_top(module: Any) -> bool:
    """Whether the module's class is one of ours, not a subclass of it."""
    return bool(mixins(type(module)))


def host_class(module: Any) -> type[nn.Module]:
    """The class that the module has without edits."""
    return _host(type(module))


def _new_swapped(host: type[nn.Module], *mixed: type[Swapped]) -> nn.Module:
    for mixin in mixed:
        mixin.prepare()
    cls = _class(host, *mixed)
    return cls.__new__(cls)


def edits_of(module: nn.Module) -> tuple[Edit, ...]:
    """The edits on a module, in order of application."""
    return tuple(module.edits()) if isinstance(module, Swapped) else ()


def check_swappable(module: nn.Module, what: str) -> None:
    """Raise `UnsupportedModel` if the class of this module would not decide how it runs."""
    if "forward" in vars(module) and "_old_forward" not in vars(module) and not _bound(module):
        raise UnsupportedModel(
            f"model: `forward` of {what} was replaced on the object itself, which hides any change"
            " of its class; delete that attribute, patch, then put it back around the patched one."
        )


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, also where its forward is bound to the object."""
    bound = _bound(module)
    module.__class__ = cls
    if bound:
        module.forward = MethodType(cls.forward, module)
    if "_old_forward" in vars(
        module
    ):  # accelerate calls the forward that it found when its hook was added
        module._old_forward = MethodType(cls.forward, module)  # type: ignore[assignment]


def _bound(module: nn.Module) -> bool:
    """Whether the object has only its class's `forward`, bound, as transformers 4 leaves it there
    after `output_hidden_states=True`.
    """
    forward = vars(module).get("forward")
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and forward.__func__ is type(module).forward
    )
