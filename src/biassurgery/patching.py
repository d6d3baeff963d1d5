"""Applying and removing patches: the only code that changes a model. All checks come first; a
failure half-way is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from biassurgery.adapters.devices import block_device, check_loaded
from biassurgery.adapters.registry import Host, Tower, Towers, find_host, find_hosts
from biassurgery.errors import AlreadyPatched, BadOption, NotPatched
from biassurgery.findings.finding import check_fits
from biassurgery.findings.sites import Sites
from biassurgery.modes import Layers, Mode, resolve_mode
from biassurgery.modes.base import Place
from biassurgery.surgery import block as surgery
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.swap import Edit, edits_of

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Patch:
    """One applied patch.

    Attributes:
        mode: what it does.
        layers: the blocks it changed, ascending.
        sites: what it was made from, for those layers.
        order: patches of a smaller one were there before.
        frozen: the parameters of the model that this patch keeps from training.
        adapted: whether PEFT had adapted the model before.
        tower: which tower of the model it is on; None: the model has one only.
    """

    mode: Mode
    layers: tuple[int, ...]
    sites: Sites
    tower: Tower | None = None
    order: int = field(default=0, compare=False)
    frozen: tuple[nn.Parameter, ...] = field(default=(), compare=False, repr=False)
    adapted: bool = field(default=False, compare=False, repr=False)


GivenSites = Sites | Mapping[Tower, Sites] | None


def patch_model(
    model: Model,
    mode: str | Mode,
    *,
    sites: GivenSites = None,
    layers: Layers = None,
    tower: Towers | None = None,
    **options: Any,
) -> Model:
    """Apply a patch to a model in place and return the same object.

    Args:
        model: a model of a supported architecture, also inside `torch.compile`, DataParallel, DDP
            or PEFT.
        mode: a name, such as `set_mean` (`biassurgery list` shows all, `biassurgery.modes.MODES`
            holds them), or a mode object.
        sites: what `calibrate` found; for both towers, {"vision": sites, "text": sites}. None: the
            published sites of the checkpoint, else a calibration on packaged text or images; a
            warning names the source.
        layers: `first` (default of modes on activations: the layer where massive activations first
            appear, as in Sun et al. 2024), `all` (default of modes on attention and registers), or
            indices.
        tower: `vision` (default), `text` or `both`, of a model that reads images and text.
        **options: fields of the mode, for example `value=` of `set_value`.

    Raises:
        SurgeryError: a child of it says what is wrong; the model is then as it was.
    """
    hosts = find_hosts(model, tower)
    if isinstance(sites, Mapping) and tower is None:
        raise BadOption(
            f"sites: a dict for {sorted(sites)}, but no tower; give Sites or, for a model of images"
            " and text, tower='both' or the one that is to be patched."
        )
    chosen = resolve_mode(mode, options)
    for host in hosts:
        _check_patchable(host)
    order = 1 + max((applied.order for applied in patches(model)), default=-1)
    root = hosts[0].root
    frozen = _to_freeze(root) if chosen.freezes else ()
    places: list[Place] = []
    for index, host in enumerate(hosts):
        given = _given(host, sites)
        if given is None:
            from biassurgery.modes.defaults import default_sites

            given = default_sites(model, host) if chosen.needs_sites else Sites()
        check_fits("sites", given.measured_on, host.facts, "calibrate on this model")
        with (
            torch.inference_mode(False),
            torch.device("cpu"),
        ):  # whatever the caller is in, these tensors outlive it
            places += _prepared(model, host, chosen, given, layers, order + index, frozen)
    _apply(places)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return model


def _to_freeze(root: nn.Module) -> tuple[nn.Parameter, ...]:
    """What is to be kept from training: all that trains, and what a patch of another tower keeps
    already, but no patch's own parameters.
    """
    freezing = [edit for _, edit in _edits(root) if edit.patch is not None and edit.patch.frozen]
    already = {id(p) for edit in freezing for p in edit.patch.frozen}  # type: ignore[union-attr]
    theirs = {id(p) for edit in freezing for p in edit.parameters()}
    return tuple(
        p
        for p in root.parameters()
        if (p.requires_grad or id(p) in already) and id(p) not in theirs
    )


def _given(host: Host, sites: GivenSites) -> Sites | None:
    """The sites that were given for one tower of a model, or for the whole."""
    if isinstance(sites, Mapping):
        if host.tower is None or host.tower not in sites:
            raise BadOption(
                f"sites: they are for {sorted(sites)}, but tower {host.tower!r} is to be patched;"
                ' give {"vision": sites, "text": sites}, or one Sites with tower="vision" or'
                ' "text".'
            )
        sites = sites[host.tower]
    return sites if sites is None or isinstance(sites, Sites) else Sites(sites)


def _prepared(
    model: nn.Module,
    host: Host,
    mode: Mode,
    sites: Sites,
    layers: Layers,
    order: int,
    frozen: tuple[nn.Parameter, ...],
) -> list[Place]:
    """The edits of one new patch of a tower, ready to be attached; nothing is changed yet."""
    places = mode.places(host, sites, layers)
    _check_new(model, mode, places, host.tower)
    chosen = tuple(sorted({place.layer for place in places if place.layer is not None}))
    kept = Sites((s for s in sites if s.layer in chosen), origin=sites.origin)
    patch = Patch(mode, chosen, kept, host.tower, order, frozen, _adapted(host.root))
    for layer, module, edit in places:
        edit.patch = patch
        device = block_device(module if layer is None else host.blocks[layer])
        if device is not None:
            edit.to(device)
    return places


def unpatch_model(model: Model, mode: str | Mode | None = None) -> Model:
    """Remove every patch, or all patches of one mode, of every tower; the model is bitwise what it
    was. Returns the same object.

    Raises:
        NotPatched: `mode` is given but not applied.
        BadOption: a later patch goes by positions that count a token which this one added.
    """
    wanted = None if mode is None else [p for p in patches(model) if mode in (p.mode, p.mode.name)]
    if wanted == []:
        applied = ", ".join(p.mode.name for p in patches(model)) or "nothing"
        raise NotPatched(f"mode: {mode!r} is not on the model; applied: {applied}.")
    remove(model, wanted)
    return model


@contextmanager
def patched(
    model: Model,
    mode: str | Mode,
    *,
    sites: GivenSites = None,
    layers: Layers = None,
    tower: Towers | None = None,
    **options: Any,
) -> Iterator[Model]:
    """`patch_model` for the length of a `with` block; only this patch is removed at its end."""
    before = patches(model)
    patch_model(model, mode, sites=sites, layers=layers, tower=tower, **options)
    added = [p for p in patches(model) if all(p is not other for other in before)]
    try:
        yield model
    finally:
        remove(model, added)


def patches(model: nn.Module) -> tuple[Patch, ...]:
    """What is applied to a model, in order of application. Read off the blocks themselves, so a
    copy has its own.
    """
    found: dict[int, Patch] = {}
    for _, edit in _edits(find_host(model).root):
        if edit.patch is not None:
            found[id(edit.patch)] = edit.patch
    return tuple(sorted(found.values(), key=lambda patch: patch.order))


def edits_by_layer(model: nn.Module, patch: Patch) -> dict[int, Edit]:
    """The edits of one patch of a model, except those of the model as a whole."""
    host = find_host(model, patch.tower)
    layers = {
        id(module): layer for layer, block in enumerate(host.blocks) for module in block.modules()
    }
    return {
        layers[id(module)]: edit
        for module, edit in _edits(host.root)
        if edit.patch is patch and id(module) in layers
    }


def _edits(root: nn.Module) -> list[tuple[nn.Module, Edit]]:
    """Every edit on a model, with its module."""
    return [(module, edit) for module in root.modules() for edit in edits_of(module)]


def _apply(places: list[Place]) -> None:
    done: list[Place] = []
    try:
        for place in places:
            done.append(place)
            place.edit.attach(place.module)
    except BaseException:
        for place in reversed(done):
            place.edit.detach(place.module)
        raise


def remove(model: nn.Module, wanted: list[Patch] | None) -> None:
    """Take the given patches, or all, off a model."""
    root = find_host(model).root
    leaving = [
        (module, edit, edit.patch)
        for module, edit in _edits(root)
        if edit.patch is not None and (wanted is None or any(edit.patch is p for p in wanted))
    ]
    gone = {id(patch) for _, _, patch in leaving}
    staying = [
        edit for _, edit in _edits(root) if edit.patch is not None and id(edit.patch) not in gone
    ]
    _check_positions([edit for _, edit, _ in leaving], staying)
    adapted = _adapted(root)
    frozen = {id(parameter) for edit in staying for parameter in edit.patch.frozen}  # type: ignore[union-attr]
    for module, edit, patch in leaving:
        edit.detach(module)
        if patch.adapted == adapted:  # else PEFT has frozen these parameters since, for itself
            for parameter in patch.frozen:
                parameter.requires_grad_(id(parameter) not in frozen)


def _check_positions(leaving: list[Edit], staying: list[Edit]) -> None:
    """Raise `BadOption` if an added token would leave from under a patch whose positions count
    it.
    """
    added = [
        edit.patch.order
        for edit in leaving
        if isinstance(edit, BlockEdit) and edit.adds and edit.patch is not None
    ]
    for edit in staying:
        if (
            added
            and isinstance(edit, BlockEdit)
            and edit.positional
            and edit.patch is not None
            and edit.patch.order > min(added)
        ):
            name = edit.patch.mode.name
            raise BadOption(
                f"mode: {name!r} was applied when a token had been added, and its positions count"
                f" that token; unpatch_model(model, {name!r}) first."
            )


def _adapted(root: nn.Module) -> bool:
    """Whether there are PEFT's adapters in the model."""
    return any(type(module).__module__.startswith("peft.") for module in root.modules())


def _check_patchable(host: Host) -> None:
    for layer, block in enumerate(host.blocks):
        surgery.check(block, layer)
    check_loaded(host)


def _check_new(model: nn.Module, mode: Mode, places: list[Place], tower: Tower | None) -> None:
    if mode.freezes and any(patch.frozen and patch.tower == tower for patch in patches(model)):
        raise BadOption(
            "trainable: 'bias', but another patch keeps the model from training already; use"
            " trainable='all', by which what is frozen stays so."
        )
    for layer, module, _ in places:
        if any(edit.patch is not None and edit.patch.mode == mode for edit in edits_of(module)):
            raise AlreadyPatched(
                f"mode: {mode.name} is on layer {layer} already; unpatch_model(model,"
                f" {mode.name!r}) first."
            )
