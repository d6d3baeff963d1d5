"""Changing how a module runs: its class becomes a subclass that mixes ours in front, and back.

A class swap keeps state-dict keys, `isinstance`, forward hooks and the module object itself, and
`torch.compile` sees it (a guard on the type fails and the module is compiled anew), where a forward
hook added later would be ignored. This file knows classes only; `Edit` decides which ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from threading import get_ident
from types import MethodType, new_class
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn

from biassurgery.errors import UnsupportedModel

Child = TypeVar("Child", bound=nn.Module)
# A mixin is always in front of a module, but is none itself.
_Module = nn.Module if TYPE_CHECKING else object


class Swapped(_Module):
    """Base of every mixin that is put in front of a host's class.

    Attributes:
        lent: names of the attributes that `lend` gives a module for as long as the mixin is there.
        keeps_signature: whether `forward` must have the signature of the host's, because others
            read it there (transformers asks a model which arguments it takes).
    """

    lent: ClassVar[tuple[str, ...]] = ()
    keeps_signature: ClassVar[bool] = False

    @classmethod
    def prepare(cls) -> None:
        """Make this process ready for modules of this class; called whenever one comes to be.

        That is at every `attach`, and when a module is read from a file.
        """

    @classmethod
    def lend(cls, module: nn.Module) -> dict[str, Any]:
        """Attributes, by the names in `lent`, that a module needs while this mixin is there.

        They are put into the module before its class changes and leave it after that, so they must
        be names that no host has: what a host calls its own is never overwritten.
        """
        return {}

    def children_of(self, kind: type[Child]) -> list[Child]:
        """The module's children of one kind, in order of application.

        Those that are for another thread's forwards are left out.
        """
        return [
            child
            for child in self._modules.values()
            if isinstance(child, kind) and (child.thread is None or child.thread == get_ident())
        ]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made here is found by its parts, for its name is the host's.
        _, _, *state = super().__reduce_ex__(2)
        return _new_swapped, (host_class(self), *mixins(type(self))), *state

    def __setstate__(self, state: Any) -> None:
        """A module of a file of an earlier version is lent what mixins have lent since."""
        super().__setstate__(state)
        mixed = mixins(type(self))
        if all(name in vars(self) for mixin in mixed for name in mixin.lent):
            return
        module: Any = self
        swapped = type(module)
        module.__class__ = host_class(module)  # as it is whenever something is lent
        try:
            lent = {name: value for mixin in mixed for name, value in mixin.lend(module).items()}
        finally:
            module.__class__ = swapped
        vars(self).update({name: lent[name] for name in lent if name not in vars(self)})


def class_with(host: type[nn.Module], added: Iterable[type[Swapped]]) -> type[nn.Module]:
    """The class of a module with some mixins, the latest outermost; the host's own without any.

    Mixins that the host has already are passed over: FSDP2 puts a class of its own in front of
    ours, which is then the host.
    """
    new = [mixin for mixin in dict.fromkeys(added) if not issubclass(host, mixin)]
    return _class(host, *reversed(new))


@functools.cache
def _class(host: type[nn.Module], *mixed: type[Swapped]) -> type[nn.Module]:
    """The subclass of a host's class with mixins in front.

    Its names are the host's: accelerate knows by them what it must not split, transformers what a
    model records of its outputs.
    """
    if not mixed:
        return host
    names: dict[str, Any] = {"__module__": host.__module__, "__qualname__": host.__qualname__}
    if any(mixin.keeps_signature for mixin in mixed):
        names["forward"] = _like_the_host(host, mixed[0])
    return new_class(host.__name__, (*mixed, host), exec_body=lambda body: body.update(names))


def _like_the_host(host: type[nn.Module], outermost: type[Swapped]) -> Any:
    """The outermost mixin's forward with the signature of the host's."""

    @functools.wraps(host.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return outermost.forward(self, *args, **kwargs)

    return forward


def mixins(cls: type) -> tuple[type[Swapped], ...]:
    """The mixins of a class that was made here; none of any other, derived ones included."""
    *mixed, _ = cls.__bases__
    return tuple(mixed) if all(issubclass(base, Swapped) for base in mixed) else ()


def host_class(module: Any) -> type[nn.Module]:
    """The class that the module has without edits."""
    cls = type(module)
    return cls.__bases__[-1] if mixins(cls) else cls


def _new_swapped(host: type[nn.Module], *mixed: type[Swapped]) -> nn.Module:
    for mixin in mixed:
        mixin.prepare()
    cls = _class(host, *mixed)
    return cls.__new__(cls)


def check_swappable(module: nn.Module, what: str) -> None:
    """Raise `UnsupportedModel` if the class of this module would not decide how it runs."""
    if "forward" in vars(module) and "_old_forward" not in vars(module) and not _bound(module):
        forward: Any = vars(module)["forward"]
        name = getattr(forward, "__qualname__", repr(forward))
        raise UnsupportedModel(
            f"model: `forward` of {what} was replaced on the object itself, by {name} of"
            f" {getattr(forward, '__module__', None)}, which hides any change of its class; delete"
            " that attribute, patch, then put it back around the patched one. Where it is of a"
            " tp_plan, leave the module out of that, or load the model on one rank."
        )


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, also where its forward is bound to the object.

    May be repeated: what an interrupted call left undone is done by the next.
    """
    bound = _bound(module)
    if bound:  # away first, so that at no moment it is the forward of a class that is gone
        del vars(module)["forward"]
    module.__class__ = cls
    if bound:
        module.forward = MethodType(cls.forward, module)
    if "_old_forward" in vars(module):
        # accelerate calls the forward that it found when its hook was added.
        module._old_forward = MethodType(cls.forward, module)  # type: ignore[assignment]


def _bound(module: nn.Module) -> bool:
    """Whether the object has its class's own `forward`, bound.

    transformers 4 leaves it there after `output_hidden_states=True`.
    """
    forward = vars(module).get("forward")
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and forward.__func__ is type(module).forward
    )
