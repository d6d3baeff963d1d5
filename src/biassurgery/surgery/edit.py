"""One change of one module, and how it comes on and off.

An edit that is on a module is its child; that it is there is all the record that there is, so
copies, files and other processes have it too. What the child does is done by a mixin in front of
the module's class, which follows from the edits that the module has:

    attach:  1. the edit becomes a child   2. attributes are lent   3. the class is swapped
    detach:  1. the class is swapped back  2. attributes are taken  3. the child goes

Only the swap changes how the module runs, in one assignment. An exception before it in `attach`, or
after it in `detach`, leaves a child that nobody asks, and another `detach` removes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from threading import get_ident
from typing import Any, NamedTuple

from torch import nn

from biassurgery.errors import AlreadyPatched
from biassurgery.surgery.swap import Swapped, class_with, host_class, set_class


class Edit(nn.Module):
    """One change of one module: a child of it while it is attached.

    It follows its module: to another device or dtype, in training or evaluation mode. Buffers that
    are in no state dict keep their values whatever is done to the model (cast, emptied, loaded
    anew), for nothing could give them back.

    Attributes:
        child: the name of that child.
        several: whether a module may have several edits of this kind, whose names are then numbered
            (`child_0`, `child_1`, ...), and which work in order of application.
        mixin: what is put in front of the module's class while the edit is on.
        patch: the patch that it belongs to; None: to none, as what only observes does.
        at_layer: the block that a patch put it on; None: the model as a whole, or not known.
        thread: the one thread whose forwards it is for; None: it is for all.
    """

    child: str
    several: bool = False
    mixin: type[Swapped]
    patch: Any = None
    at_layer: int | None = None
    thread: int | None = None

    def attach(self, module: nn.Module) -> None:
        """Put this edit on a module, after those that are there; once is enough.

        The module is as it was if that fails.

        Raises:
            AlreadyPatched: the module has another child of this name.
        """
        name = self._name_on(module)
        try:
            self.child = name
            self.train(module.training)
            module._modules[name] = self
            self.mixin.prepare()
            if not isinstance(module, self.mixin):
                vars(module).update(self.mixin.lend(module))
            set_class(module, class_with(host_class(module), _mixins_of(module)))
        except BaseException:
            self.detach(module)
            raise

    def detach(self, module: nn.Module) -> None:
        """Take this edit off; nothing happens if it is not on.

        With the last one of its kind the mixin goes, and with the last mixin the module gets its
        own class back, unless another library (FSDP2) has subclassed ours since.
        """
        if module._modules.get(self.child) is not self:
            return
        set_class(module, class_with(host_class(module), _mixins_of(module, leaving=self)))
        if not isinstance(module, self.mixin):
            for name in self.mixin.lent:
                vars(module).pop(name, None)
        del module._modules[self.child]

    def _apply(self, fn: Any, recurse: bool = True) -> Edit:
        # What `to`, `half`, `cuda`, `to_empty` and their kin go through.
        kept = {name: self._buffers[name] for name in self._non_persistent_buffers_set}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer if moved.is_meta else buffer.to(moved.device)
        return self

    def _name_on(self, module: nn.Module) -> str:
        """The name of the child that this edit is, or will be."""
        if module._modules.get(self.child) is self:
            return self.child
        if self.several:
            names = (f"{type(self).child}_{number}" for number in count())
            return next(name for name in names if name not in module._modules)
        if self.child in module._modules:
            raise AlreadyPatched(
                f"mode: there is {self.child!r} on {type(module).__name__} already;"
                " unpatch_model(model) first."
            )
        return self.child


class Place(NamedTuple):
    """One edit, the module that it goes to, and the layer; None: the model as a whole."""

    layer: int | None
    module: nn.Module
    edit: Edit


def edits_of(module: nn.Module) -> tuple[Edit, ...]:
    """The edits on a module, in order of application."""
    return tuple(child for child in module._modules.values() if isinstance(child, Edit))


def edits_in(root: nn.Module) -> list[tuple[nn.Module, Edit]]:
    """Every edit on a model, with its module."""
    return [
        (module, child)
        for module in root.modules()
        for child in module._modules.values()
        if isinstance(child, Edit)
    ]


def attach_all(places: Sequence[Place]) -> None:
    """Attach every edit, or none: what was attached comes off again at any exception."""
    try:
        for place in places:
            place.edit.attach(place.module)
    except BaseException:
        detach_all(places)
        raise


@contextmanager
def attached(places: Sequence[Place], *, all_threads: bool = False) -> Iterator[None]:
    """Within the block every edit is on its module; at its end none is, whatever happens.

    Where other threads run the model meanwhile, the edits are not for their forwards, unless it is
    said that they are.

    An interruption may come at any line, also before they begin to come off: they are then taken
    off after it, and it is raised when all are off.
    """
    try:
        try:
            for place in places:
                place.edit.thread = None if all_threads else get_ident()
            attach_all(places)
            yield
        finally:
            detach_all(places)
            for place in places:  # it may be attached again, for good
                place.edit.thread = None
    except BaseException:
        detach_all(places)
        raise


def detach_all(places: Iterable[Place]) -> None:
    """Detach every edit that is on, the latest first; may be repeated after an interruption."""
    for place in reversed(list(places)):
        place.edit.detach(place.module)


def _mixins_of(module: nn.Module, leaving: Edit | None = None) -> list[type[Swapped]]:
    """The mixins that a module's edits ask for, in order of application, one edit left out."""
    return [edit.mixin for edit in edits_of(module) if edit is not leaving]
