"""Applying and removing patches: the only code that changes a model. All checks come first; a
failure half-way is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from biassurgery.surgery import block as surgery
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.edit import Edit, Place, attach_all, detach_all, edits_in, edits_of

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
        # Whatever the caller is in, these tensors outlive it.
        with torch.inference_mode(False), torch.device("cpu"):
            places += _prepared(model, host, chosen, given, layers, order + index, frozen)
    _apply(places, frozen)
    return model


def _to_freeze(root: nn.Module) -> tuple[nn.Parameter, ...]:
    """What is to be kept from training: all that trains, and what a patch of another tower keeps
    already, but no patch's own parameters.

    With a bias on the text tower that trains alone, the image tower's patch finds every parameter
    of the model frozen, and the text tower's biases trainable. It freezes the model's, so that they
    stay frozen whichever of the two patches goes first, and leaves those biases alone.
    """
    freezing = [edit for _, edit in edits_in(root) if edit.patch is not None and edit.patch.frozen]
    # Sets of parameters are right: they hash by identity, so `in` never compares values.
    already = {parameter for edit in freezing for parameter in edit.patch.frozen}
    biases = {parameter for edit in freezing for parameter in edit.parameters()}
    return tuple(
        parameter
        for parameter in root.parameters()
        if (parameter.requires_grad or parameter in already) and parameter not in biases
    )


def _apply(places: list[Place], frozen: tuple[nn.Parameter, ...]) -> None:
    """Attach and freeze all, or, at any exception, nothing."""
    trained = [parameter for parameter in frozen if parameter.requires_grad]
    try:
        attach_all(places)
        for parameter in frozen:
            parameter.requires_grad_(False)
    except BaseException:
        detach_all(places)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


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

    Args:
        model: of a supported architecture, also wrapped.
        mode: a name, or a mode object equal to the one that was applied; None: all patches.

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
    """`patch_model` for the length of a `with` block; only this patch is removed at its end.

    Args:
        model, mode, sites, layers, tower, **options: as in `patch_model`.

    Raises:
        SurgeryError: a child of it says what is wrong; the model is then as it was.
    """
    before = patches(model)
    added: list[Patch] | None = None
    try:
        patch_model(model, mode, sites=sites, layers=layers, tower=tower, **options)
        added = _added_since(before, model)
        yield model
    finally:
        # Patches that the block itself applied stay, so the list is made before it. It is not there
        # where `patch_model` refused or was interrupted.
        remove(model, _added_since(before, model) if added is None else added)


def _added_since(before: tuple[Patch, ...], model: nn.Module) -> list[Patch]:
    return [patch for patch in patches(model) if not _is_in(patch, before)]


def patches(model: nn.Module) -> tuple[Patch, ...]:
    """What is applied to a model, in order of application. Read off the blocks themselves, so a
    copy has its own.

    Args:
        model: of a supported architecture, also wrapped.

    Raises:
        UnsupportedModel: no adapter knows it.
    """
    edits = edits_in(find_host(model).root)
    applied = {id(edit.patch): edit.patch for _, edit in edits if edit.patch is not None}
    return tuple(sorted(applied.values(), key=lambda patch: patch.order))


def edits_by_layer(model: nn.Module, patch: Patch) -> dict[int, Edit]:
    """The edits of one patch of a model, except those of the model as a whole."""
    host = find_host(model, patch.tower)
    layers = {
        id(module): layer for layer, block in enumerate(host.blocks) for module in block.modules()
    }
    return {
        layers[id(module)]: edit
        for module, edit in edits_in(host.root)
        if edit.patch is patch and id(module) in layers
    }


def remove(model: nn.Module, wanted: list[Patch] | None) -> None:
    """Take the given patches, or all, off a model. Once it has begun it goes on to the end, and an
    interruption is raised after that.
    """
    root = find_host(model).root
    edits = [(module, edit) for module, edit in edits_in(root) if edit.patch is not None]
    gone = {id(edit.patch) for _, edit in edits if wanted is None or _is_in(edit.patch, wanted)}
    leaving = [Place(None, module, edit) for module, edit in edits if id(edit.patch) in gone]
    staying = [edit for _, edit in edits if id(edit.patch) not in gone]
    _check_positions([place.edit for place in leaving], staying)
    thawed = _to_thaw(root, leaving, staying)
    try:
        _take_off(leaving, thawed)
    except BaseException:
        _take_off(leaving, thawed)
        raise


def _take_off(leaving: list[Place], thawed: list[nn.Parameter]) -> None:
    detach_all(leaving)
    for parameter in thawed:
        parameter.requires_grad_(True)


def _to_thaw(root: nn.Module, leaving: list[Place], staying: list[Edit]) -> list[nn.Parameter]:
    """What trains again when some patches leave: what they kept from training and no other patch
    does. Where PEFT came or went meanwhile, it has frozen these parameters for itself.
    """
    adapted = _adapted(root)
    kept = {parameter for edit in staying for parameter in edit.patch.frozen}
    freed = {
        parameter
        for place in leaving
        if place.edit.patch.adapted == adapted
        for parameter in place.edit.patch.frozen
    }
    return list(freed - kept)


def _is_in(patch: Patch, patches: Sequence[Patch]) -> bool:
    """Whether a patch is one of these very objects: equal ones are on other towers."""
    return any(patch is other for other in patches)


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
