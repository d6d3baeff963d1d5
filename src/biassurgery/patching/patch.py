"""Applying patches, and removing them: `patch_model`, `unpatch_model`, `patched`.

All checks come first; a failure half-way is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from biassurgery.adapters.devices import block_device, check_loaded, check_real
from biassurgery.adapters.layers import fit_to
from biassurgery.adapters.registry import Host, Tower, Towers, find_hosts, find_root
from biassurgery.adapters.scale import in_units_of, scale_of
from biassurgery.errors import AlreadyPatched, BadOption, Incompatible, NotPatched
from biassurgery.findings.finding import check_fits
from biassurgery.findings.sites import Sites
from biassurgery.measure.fingerprint import in_words
from biassurgery.measure.reading import check_unread
from biassurgery.measure.together import together
from biassurgery.modes import Layers, Mode, resolve_mode
from biassurgery.patching.applied import Kept, Patch, is_adapted, is_among, kept_by, patches
from biassurgery.patching.parallel import check_gradients, make_alike
from biassurgery.patching.removing import remove
from biassurgery.surgery.block import check_block
from biassurgery.surgery.edit import Place, attach_all, detach_all, edits_in, edits_of

Model = TypeVar("Model", bound=nn.Module)
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
        layers: `first` (default of modes on activations: each channel where its massive values are
            born, as in Sun et al. 2024, and again where they have grown since by more than the
            definition, so that `set_zero` leaves none), `all` (default of modes on attention and
            registers), or indices.
        tower: `vision` (default), `text` or `both`, of a model that reads images and text.
        **options: fields of the mode, for example `value=` of `set_value`.

    Raises:
        SurgeryError: a child of it says what is wrong; the model is then as it was.
        RankFailed: another of the ranks that run this model together has failed, or does not
            answer.
    """
    with together("patch_model", model) as ranks:
        places, frozen = _planned(model, mode, sites, layers, tower, options)
        ranks.same(patches=in_words(place.edit for place in places))  # so all have come so far
        make_alike(find_root(model), places)
        _apply(places, frozen)
    return model


def _planned(
    model: nn.Module,
    mode: str | Mode,
    sites: GivenSites,
    layers: Layers,
    tower: Towers | None,
    options: dict[str, Any],
) -> tuple[list[Place], tuple[Kept, ...]]:
    """All edits of a new patch and what it keeps from training; nothing is changed yet."""
    hosts = find_hosts(model, tower)
    check_unread(hosts[0].root)
    if isinstance(sites, Mapping) and tower is None:
        raise BadOption(
            f"sites: a dict for {sorted(sites)}, but no tower; give Sites or, for a model of images"
            " and text, tower='both' or the one that is to be patched."
        )
    mode = resolve_mode(mode, options)
    for host in hosts:
        _check_patchable(host)
    order = 1 + max((applied.order for applied in patches(model)), default=-1)
    root = hosts[0].root
    frozen = _to_freeze(root) if mode.freezes else ()
    places: list[Place] = []
    for index, host in enumerate(hosts):
        tower_sites = _sites_of_tower(host, sites)
        if tower_sites is None:
            from biassurgery.modes.defaults import default_sites

            tower_sites = default_sites(model, host) if mode.needs_sites else Sites()
        tower_sites.check()
        check_fits("sites", tower_sites.measured_on, host.facts, "calibrate on this model")
        tower_sites = _in_units_of(host, tower_sites)
        own = mode.resolved(host)
        # Whatever the caller is in, these tensors outlive it.
        with torch.inference_mode(False), torch.device("cpu"):
            places += _prepared(model, host, own, tower_sites, layers, order + index, frozen)
    return places, frozen


def _to_freeze(root: nn.Module) -> tuple[Kept, ...]:
    """What a new patch is to keep from training.

    All that trains, and what a patch of another tower keeps already, but no patch's own parameters.

    With a bias on the text tower that trains alone, the image tower's patch finds every parameter
    of the model frozen, and the text tower's biases trainable. It freezes the model's, so that they
    stay frozen whichever of the two patches goes first, and leaves those biases alone.
    """
    edits = [edit for _, edit in edits_in(root)]
    freezing = [edit for edit in edits if edit.patch is not None and edit.patch.frozen]
    already = kept_by(freezing)
    biases = {parameter for edit in freezing for parameter in edit.parameters()}
    return tuple(
        Kept(module, name)
        for module in root.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
        if (parameter.requires_grad or parameter in already) and parameter not in biases
    )


def _apply(places: list[Place], frozen: tuple[Kept, ...]) -> None:
    """Attach and freeze all, or, at any exception, nothing."""
    parameters = [kept.parameter for kept in frozen if kept.parameter is not None]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        attach_all(places)
        for parameter in parameters:
            parameter.requires_grad_(False)
    except BaseException:
        detach_all(places)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


def _sites_of_tower(host: Host, sites: GivenSites) -> Sites | None:
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


def _in_units_of(host: Host, sites: Sites) -> Sites:
    """The sites in the units of the model's residual stream, which `rescale` changes."""
    if not len(sites) or sites.origin.factor == scale_of(host):
        return sites
    if sites.origin.architecture is None:
        raise Incompatible(
            "sites: they do not say what they were measured on, and the model is rescaled by"
            f" {scale_of(host):g}; give Sites(list, origin=sites.origin), by which they are"
            " converted if need be, or calibrate on this model."
        )
    return in_units_of(host, "sites", sites)


def _prepared(
    model: nn.Module,
    host: Host,
    mode: Mode,
    sites: Sites,
    layers: Layers,
    order: int,
    frozen: tuple[Kept, ...],
) -> list[Place]:
    """The edits of one new patch of a tower, ready to be attached; nothing is changed yet."""
    places = mode.places(host, sites, layers)
    fit_to(host, places)
    _check_new(model, mode, places, host.tower)
    check_gradients(model, host, mode, places)
    changed = tuple(sorted({place.layer for place in places if place.layer is not None}))
    used = mode.used(host, sites, layers)
    used = Sites((site for site in used if site.layer in changed), origin=sites.origin)
    patch = Patch(mode, changed, used, host.tower, order, frozen, is_adapted(host.root))
    for layer, module, edit in places:
        check_real(edit)
        edit.patch = patch
        edit.at_layer = layer
        device = block_device(module if layer is None else host.blocks[layer])
        if device is not None:
            edit.to(device)
    return places


def unpatch_model(model: Model, mode: str | Mode | None = None) -> Model:
    """Remove every patch, or all patches of one mode, of every tower; returns the same object.

    The model is bitwise what it was.

    Args:
        model: of a supported architecture, also wrapped.
        mode: a name, or a mode object equal to the one that was applied; None: all patches.

    Raises:
        NotPatched: `mode` is given but not applied.
        BadOption: a later patch goes by positions that count a token which this one added.
        UnsupportedModel: DistributedDataParallel would wait for parameters that leave.
        ModelInUse: another thread is measuring the model.
    """
    check_unread(find_root(model))
    if mode is None:
        remove(model, None)
        return model
    applied = patches(model)
    leaving = [patch for patch in applied if mode == patch.mode.name or patch.mode.is_same(mode)]
    if not leaving:
        names = ", ".join(patch.mode.name for patch in applied) or "nothing"
        raise NotPatched(f"mode: {mode!r} is not on the model; applied: {names}.")
    remove(model, leaving)
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
    return [patch for patch in patches(model) if not is_among(patch, before)]


def _check_patchable(host: Host) -> None:
    for layer, block in enumerate(host.blocks):
        check_block(block, layer)
    check_loaded(host)


def _check_new(model: nn.Module, mode: Mode, places: list[Place], tower: Tower | None) -> None:
    if mode.freezes and any(patch.frozen and patch.tower == tower for patch in patches(model)):
        raise BadOption(
            "trainable: 'bias', but another patch keeps the model from training already; use"
            " trainable='all', by which what is frozen stays so."
        )
    for layer, module, _ in places:
        if layer is not None and any(
            edit.patch is not None and mode.is_same(edit.patch.mode) for edit in edits_of(module)
        ):
            raise AlreadyPatched(
                f"mode: {mode.name} is on layer {layer} already; unpatch_model(model,"
                f" {mode.name!r}) first."
            )
