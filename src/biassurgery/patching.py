"""Applying and removing patches: the only code that changes a model. All checks come first; a failure half-way is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from biassurgery import surgery
from biassurgery.adapters.registry import Host, find_host
from biassurgery.devices import block_device, check_loaded
from biassurgery.errors import AlreadyPatched, IncompatibleSites, NotPatched
from biassurgery.modes import Layers, Mode, resolve_mode
from biassurgery.sites import Sites

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Patch:
    """One applied patch.

    Attributes:
        mode: what it does.
        layers: the blocks it changed, ascending.
        sites: what it was made from, for those layers.
        order: patches of a smaller one were there before.
    """

    mode: Mode
    layers: tuple[int, ...]
    sites: Sites
    order: int = field(default=0, compare=False)


def patch_model(model: Model, mode: str | Mode, *, sites: Sites | None = None, layers: Layers = None, **options: Any) -> Model:
    """Apply a patch to a model in place and return the same object.

    Args:
        model: a model of a supported architecture, also inside `torch.compile`, DataParallel, DDP or PEFT.
        mode: a name (`set_mean`, `set_zero`, `set_value`, `noise`, `shuffle`, `zero_random`) or a mode object.
        sites: what `calibrate` found. None: the published sites of the checkpoint, else a calibration on packaged text or images;
            a warning names the source.
        layers: `first` (default: the layer where massive activations first appear, as in Sun et al. 2024), `all`, or indices.
        **options: fields of the mode, for example `value=` of `set_value`.

    Raises:
        SurgeryError: a child of it says what is wrong; the model is then as it was.
    """
    host = find_host(model)
    chosen = resolve_mode(mode, options)
    _check_patchable(host)
    if sites is None:
        from biassurgery.defaults import default_sites

        sites = default_sites(model, host) if chosen.needs_sites else Sites()
    elif not isinstance(sites, Sites):
        sites = Sites(sites)
    _check_origin(host, sites)
    with torch.inference_mode(False), torch.device("cpu"):  # whatever the caller is in, these tensors outlive it
        edits = chosen.edits(host, sites, layers)
        _check_new(host, chosen, edits)
        order = 1 + max((applied.order for applied in patches(model)), default=-1)
        patch = Patch(chosen, tuple(edits), Sites((s for s in sites if s.layer in edits), origin=sites.origin), order)
        for layer, edit in edits.items():
            edit.patch, edit.width, edit.layout = patch, host.width, host.layout  # type: ignore[assignment]
            device = block_device(host.blocks[layer])
            if device is not None:
                edit.to(device)
    _apply(host, edits)
    return model


def unpatch_model(model: Model, mode: str | Mode | None = None) -> Model:
    """Remove every patch, or all patches of one mode; the model is bitwise what it was. Returns the same object.

    Raises:
        NotPatched: `mode` is given but not applied.
    """
    host = find_host(model)
    wanted = None if mode is None else [p for p in patches(model) if mode in (p.mode, p.mode.name)]
    if wanted == []:
        applied = ", ".join(p.mode.name for p in patches(model)) or "nothing"
        raise NotPatched(f"mode: {mode!r} is not on the model; applied: {applied}.")
    remove(host, wanted)
    return model


@contextmanager
def patched(model: Model, mode: str | Mode, *, sites: Sites | None = None, layers: Layers = None, **options: Any) -> Iterator[Model]:
    """`patch_model` for the length of a `with` block; only this patch is removed at its end."""
    before = patches(model)
    patch_model(model, mode, sites=sites, layers=layers, **options)
    added = [p for p in patches(model) if all(p is not other for other in before)]
    try:
        yield model
    finally:
        remove(find_host(model), added)


def patches(model: nn.Module) -> tuple[Patch, ...]:
    """What is applied to a model, in order of application. Read off the blocks themselves, so a copy has its own."""
    found: dict[int, Patch] = {}
    for block in find_host(model).blocks:
        for edit in surgery.edits_of(block):
            patch = getattr(edit, "patch", None)
            if patch is not None:
                found[id(patch)] = patch
    return tuple(sorted(found.values(), key=lambda patch: patch.order))


def _apply(host: Host, edits: dict[int, surgery.Edit]) -> None:
    done: list[int] = []
    try:
        for layer, edit in edits.items():
            done.append(layer)
            surgery.attach(host.blocks[layer], edit)
    except BaseException:
        for layer in done:
            surgery.detach(host.blocks[layer], edits[layer])
        raise


def remove(host: Host, wanted: list[Patch] | None) -> None:
    """Take the given patches, or all, off a model."""
    for block in host.blocks:
        for edit in surgery.edits_of(block):
            patch = getattr(edit, "patch", None)
            if patch is not None and (wanted is None or any(patch is p for p in wanted)):
                surgery.detach(block, edit)


def _check_patchable(host: Host) -> None:
    for layer, block in enumerate(host.blocks):
        surgery.check(block, layer)
    check_loaded(host)


def _check_origin(host: Host, sites: Sites) -> None:
    """Refuse sites of another architecture or size."""
    theirs = (sites.origin.architecture, sites.origin.layers, sites.origin.width)
    ours = (host.architecture, len(host.blocks), host.width)
    for name, a, b in zip(("architecture", "number of layers", "hidden size"), theirs, ours):
        if a is not None and a != b:
            raise IncompatibleSites(f"sites: they were measured on a model whose {name} is {a!r}, this one's is {b!r}; calibrate on "
                                    "this model.")


def _check_new(host: Host, mode: Mode, edits: dict[int, surgery.Edit]) -> None:
    for layer in edits:
        for edit in surgery.edits_of(host.blocks[layer]):
            patch = getattr(edit, "patch", None)
            if patch is not None and patch.mode == mode:
                raise AlreadyPatched(f"mode: {mode.name} is on layer {layer} already; unpatch_model(model, {mode.name!r}) first.")
