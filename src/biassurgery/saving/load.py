"""`load_patch`: what a folder, or a repository of the hub, holds is applied to a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.registry import Host, Tower, every_host
from biassurgery.errors import FileError, Incompatible, LevelOverflow
from biassurgery.findings.files import as_path, checksum_of
from biassurgery.measure.together import together
from biassurgery.patching import Model, Patch, patch_model, patches
from biassurgery.patching.applied import edits_by_layer, is_among
from biassurgery.patching.removing import remove
from biassurgery.saving.document import OF_MODE, saved_patches
from biassurgery.saving.folder import JSON, TENSORS, as_text, read_folder


def load_patch(model: Model, folder: str | Path) -> Model:
    """Apply what `save_patch` wrote, in place, and return the same object.

    All patches are applied, or none. `surgery.safetensors` decides; a warning says if the
    `surgery.json` beside it is of another save, or if an earlier version wrote the folder.

    Args:
        model: of the architecture and size that the patches were saved from.
        folder: where `save_patch` wrote; or, if there is no such folder, the `user/name` that
            `push_to_hub` uploaded to.

    Raises:
        Incompatible: written for another architecture or size; the message says what differs.
        FileError: a file is missing, truncated, damaged, edited, or of a newer format.
        LevelOverflow: the model's dtype cannot hold a parameter of a patch.
        MissingPackage: a mode or a kind of bias is of a package that is neither imported nor
            installed under the entry-point group `biassurgery.extensions`.
        AlreadyPatched: one of the patches is on the model already.
        RankFailed: another of the ranks that run this model together has failed, or does not
            answer.
    """
    with together("load_patch", model) as ranks:
        hosts = every_host(model)
        folder = _local(folder)
        document, tensors = read_folder(folder)
        saved = saved_patches(document, tensors, folder)
        towers: list[Tower | None] = [_matching(hosts, one.model, folder).tower for one in saved]
        if not ranks.alone:
            ranks.same(folder=f"of the checksum {checksum_of(tensors, {'': as_text(document)})}")
        before = patches(model)
        try:
            for patch, tower in zip(saved, towers):
                patch_model(model, patch.mode, sites=patch.sites, layers=patch.layers, tower=tower)
                _fill(model, patches(model)[-1], patch.tensors, folder)
            ranks.same()  # none has failed
        except BaseException:  # also Ctrl-C: all patches are applied, or none
            remove(model, [patch for patch in patches(model) if not is_among(patch, before)])
            raise
    return model


def _matching(hosts: list[Host], saved: dict[str, Any], folder: Path) -> Host:
    """The model, or the tower of it, that a patch was saved from."""
    for host in hosts:
        if host.facts == saved:
            return host
    nearest = next((host for host in hosts if host.architecture == saved["architecture"]), hosts[0])
    name, value = next((n, v) for n, v in nearest.facts.items() if v != saved[n])
    raise Incompatible(
        f"folder: {folder} holds patches for {name} {saved[name]!r}, this model's is {value!r};"
        " load them onto the kind of model that they were saved from."
    )


def _fill(model: nn.Module, patch: Patch, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put saved tensors, by `layer.name`, into the edits of a patch."""
    tensors = {name: value for name, value in tensors.items() if not name.startswith(OF_MODE)}
    expected = {
        f"{layer}.{name}": value
        for layer, edit in edits_by_layer(model, patch).items()
        for name, value in edit.state_dict().items()
    }
    differ = sorted(
        name
        for name in expected.keys() | tensors.keys()
        if _form(expected.get(name)) != _form(tensors.get(name))
    )
    if differ:
        raise FileError(
            f"folder: the tensors in {folder / TENSORS} are not those of {patch.mode.name} on this"
            f" model (they differ at {', '.join(differ[:4])}); pass a folder written by"
            " save_patch()."
        )
    new = {name: tensors[name].to(value.dtype) for name, value in expected.items()}
    for name, value in expected.items():
        # A kind of bias of another package may have infinities of its own.
        if bool(value.isfinite().all()):
            _check_finite(name, tensors[name], new[name], folder)
    with torch.no_grad():
        # What state_dict gives shares its memory with the model.
        for name, value in expected.items():
            value.copy_(new[name])


def _form(tensor: Tensor | None) -> tuple[Any, ...]:
    """What a saved tensor must have in common with the one that it fills."""
    return () if tensor is None else (tensor.shape, tensor.dtype.is_floating_point)


def _check_finite(name: str, saved: Tensor, new: Tensor, folder: Path) -> None:
    """Raise if a saved tensor is not finite, in the file or in the model's dtype."""
    if not bool(saved.isfinite().all()):
        raise FileError(
            f"folder: {name} in {folder / TENSORS} is not finite (NaN or infinity); train and save"
            " the patch again."
        )
    if not bool(new.isfinite().all()):
        raise LevelOverflow(
            f"folder: {name} in {folder / TENSORS} reaches {saved.abs().max().item():g}, which the"
            f" model's {new.dtype} cannot hold; convert the model to bfloat16 or float32 first."
        )


def _local(folder: str | Path) -> Path:
    """The folder itself, or what was downloaded from the repository of that name."""
    path = as_path("folder", folder)
    # `../patch` and `./patch` are folders that are not there, not names of users of the hub.
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(folder), allow_patterns=[JSON, TENSORS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise FileError(
            f"folder: {folder} is neither a folder nor a repository of the hub that can be read"
            f" ({error}); check the name."
        ) from error
