"""Which adapter serves a model: built-in ones, third-party ones, then the structural fallback."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from biassurgery.adapters.base import Adapter
from biassurgery.adapters.unknown import image_tower, unknown
from biassurgery.adapters.wrappers import check_wrappers, unwrap
from biassurgery.errors import BadOption, UnsupportedModel
from biassurgery.kinds import load_entry_points, load_extensions, path_of

GROUP = "biassurgery.adapters"
Tower = Literal["vision", "text", "audio"]
Towers = Literal["vision", "text", "audio", "both"]
_MODALITIES: dict[str, Tower] = {"image": "vision", "text": "text", "audio": "audio"}
_ADAPTERS: list[Adapter] = []
AdapterClass = TypeVar("AdapterClass", bound=type[Adapter])


def register_adapter(adapter: AdapterClass) -> AdapterClass:
    """Class decorator that makes an `Adapter` known.

    Of those that match a model, the one registered last serves it.

    From another package, name its module under the entry-point group `biassurgery.extensions` (or
    the class itself under `biassurgery.adapters`) and it is found without an import. A class of the
    same module and name registered again takes the place of the first.

    Args:
        adapter: a class derived from `TextAdapter` or `ImageAdapter`.

    Raises:
        BadOption: not an `Adapter` class, one that lacks a method, or one whose family another
            class has.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, Adapter)):
        raise BadOption(
            f"adapter: {adapter!r} is not a subclass of biassurgery.extend.Adapter; decorate the"
            " class itself."
        )
    missing = sorted(getattr(adapter, "__abstractmethods__", ()))
    if missing:
        raise BadOption(
            f"adapter: {adapter.__qualname__} lacks the methods {', '.join(missing)}; define them."
        )
    path = path_of(adapter)
    holder = next((a for a in _ADAPTERS if a.family == adapter.family), None)
    if holder is not None and path_of(type(holder)) != path:
        raise BadOption(
            f"family: {adapter.family!r} of {path} is taken by {path_of(type(holder))}; give it"
            " another name."
        )
    _ADAPTERS[:] = [a for a in _ADAPTERS if path_of(type(a)) != path]
    _ADAPTERS.insert(0, adapter())
    return adapter


def adapters() -> tuple[Adapter, ...]:
    """All known adapters, the one that is asked first in front."""
    _load_installed()
    return tuple(_ADAPTERS)


@functools.cache
def _load_installed() -> None:
    # The built-in ones are there, for this module's package imports them; so others go before them.
    load_extensions()
    load_entry_points(GROUP, "the models that it describes are not known", register_adapter)


@dataclass(frozen=True, eq=False)
class Host:
    """A model together with what its adapter says of it.

    Attributes:
        model: what is operated on: a tower, or the whole.
        root: the whole model.
        tower: which of the model's towers; None: it has one only.
        adapter: what knows the model.
        blocks: its transformer layers, in order.
        architecture: its family, as findings name it.
        width: channels of the residual stream.
        roles: that tokens can have, those of the first positions first.
        layout: the axes of a hidden state, `BTD` or another order.
    """

    model: nn.Module
    root: nn.Module
    tower: Tower | None
    adapter: Adapter
    blocks: tuple[nn.Module, ...]
    architecture: str
    width: int
    roles: tuple[str, ...]
    layout: str

    @property
    def facts(self) -> dict[str, Any]:
        """What sites and patches of this model are keyed to."""
        return {
            "architecture": self.architecture,
            "layers": len(self.blocks),
            "width": self.width,
        }


def find_host(model: nn.Module, tower: Tower | None = None) -> Host:
    """Look a model up in the registry.

    Args:
        model: the model itself, or wrapped.
        tower: which tower of a model of images and text; None: that of images, or the only one.

    Raises:
        UnsupportedModel: no adapter matches, one block serves as several layers, or a wrapper does
            not run the model as it is.
        BadOption: a tower that the model does not have.
    """
    check_wrappers(model)
    return _find(model, tower)


def find_root(model: nn.Module) -> nn.Module:
    """The whole model, where it is looked at only for what is on it, whatever wraps it now.

    Raises:
        UnsupportedModel: as `find_host`.
    """
    try:
        return _find(model).root
    except UnsupportedModel:
        inner = unwrap(model)
        if not any(adapter.by_name(inner) for adapter in _towers(model).values()):
            raise
        return inner  # a tower that is named may be served where the model as a whole is not


def _find(model: nn.Module, tower: Tower | None = None) -> Host:
    towers = _towers(model)
    if tower is not None and tower not in towers:
        extra = " (both are measured one at a time)" if tower == "both" else ""
        asked = tower != "text" and "vision" not in towers
        reason = image_tower(unwrap(model)) if asked else None
        extra = extra if reason is None else f" ({reason})"
        raise BadOption(
            f"tower: {tower!r}; {type(unwrap(model)).__name__} has"
            f" {' and '.join(map(repr, towers))}{extra}; name one of these, or leave tower= out."
        )
    inner = unwrap(model)
    named = {name for name, adapter in towers.items() if adapter.by_name(inner)}
    meant: list[Tower] = [name for name in towers if name not in named] or list(towers)
    chosen: Tower = tower or ("vision" if "vision" in meant else next(iter(meant)))
    # The tower that is always meant is the model itself.
    other = len(towers) - len(named - {chosen}) > 1
    return _host(inner, towers[chosen], chosen if other else None)


def find_hosts(model: nn.Module, tower: Towers | None = None) -> list[Host]:
    """The hosts of one or, by `both`, of both towers of a model; see `find_host`."""
    if tower == "both":
        return [find_host(model, "vision"), find_host(model, "text")]
    return [find_host(model, tower)]


def every_host(model: nn.Module) -> list[Host]:
    """The model, or each of its towers; one that is meant by name alone, where it is served."""
    hosts = []
    for tower, adapter in _towers(model).items():
        try:
            hosts.append(find_host(model, tower))
        except UnsupportedModel:
            if not adapter.by_name(unwrap(model)):
                raise
    return hosts


def _towers(model: nn.Module) -> dict[Tower, Adapter]:
    """The adapter for each tower that a model has: of each modality the first that matches."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"model: {type(model).__name__} is not a torch.nn.Module; pass the model object itself."
        )
    inner = unwrap(model)
    towers = dict[Tower, Adapter]()
    for adapter in adapters():
        name = _MODALITIES[adapter.modality]
        if name not in towers and adapter.matches(inner):
            towers[name] = adapter
    if not towers:
        raise UnsupportedModel(unknown(inner, sorted({a.family for a in _ADAPTERS})))
    return towers


def _host(root: nn.Module, adapter: Adapter, tower: Tower | None) -> Host:
    inner = adapter.part(root)
    blocks = tuple(unwrap(block) for block in adapter.blocks(inner))
    if not blocks:
        raise UnsupportedModel(
            f"model: {type(inner).__name__} has no transformer blocks; there is nothing to"
            " operate on."
        )
    if len({id(block) for block in blocks}) < len(blocks):
        raise UnsupportedModel(
            f"model: {type(inner).__name__} uses one block object as several layers, so a single"
            " layer cannot be changed; untie the layers (copy.deepcopy each) first."
        )
    return Host(
        inner,
        root,
        tower,
        adapter,
        blocks,
        adapter.architecture(inner),
        adapter.width(inner),
        adapter.roles(inner),
        adapter.layout(inner),
    )


def first_register(host: Host) -> int:
    """The position of the first register token.

    Raises:
        UnsupportedModel: there is none.
    """
    if "register:0" not in host.roles:
        raise UnsupportedModel(
            f"model: {type(host.model).__name__} has no register tokens; massive activations of"
            " models without them are fixed by set_mean, and test_time_registers adds one."
        )
    return host.roles.index("register:0")
