"""`save_patch` and `load_patch`: the patches of a model in a small folder, without the model."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from biassurgery.adapters.parallel import gathered
from biassurgery.adapters.registry import Host, Tower, every_host, find_host
from biassurgery.errors import FileError, Incompatible, MissingPackage, NotPatched
from biassurgery.findings.files import CORRUPT, as_path, read_tensors, replacing, write_tensors
from biassurgery.findings.sites import Sites
from biassurgery.modes import MODES, Mode
from biassurgery.modes.saved import check_known, modules_of
from biassurgery.patching import Model, Patch, patch_model, patches
from biassurgery.patching.applied import edits_by_layer, is_among
from biassurgery.patching.removing import remove

FORMAT = 1
JSON = "surgery.json"
TENSORS = "surgery.safetensors"
# in front of the names of tensors that belong to a mode, not to an edit of a layer
OF_MODE = "mode."


@dataclass(frozen=True)
class _Saved:
    """One patch of a folder: what it does, where, of which model it is, and its tensors."""

    mode: Mode
    layers: tuple[int, ...]
    sites: Sites
    model: dict[str, Any]
    tensors: dict[str, Tensor]


def save_patch(model: nn.Module, folder: str | Path) -> None:
    """Write every patch of a model to `surgery.json` (what, where, on which architecture) and
    `surgery.safetensors` (its tensors).

    On a model that is split over ranks, every rank has to call it, to gather the tensors; all write
    the same files, which load on any number of ranks.

    Args:
        model: with patches.
        folder: to write to; it is made.

    Raises:
        NotPatched: nothing is applied.
        BadOption: a patch whose class could not be found again by its name.
        FileError: the folder cannot be written.
    """
    applied = patches(model)
    folder = as_path("folder", folder)
    if not applied:
        raise NotPatched(
            "model: nothing is applied, so there is nothing to save; patch_model(model, ...) first."
        )
    document = {
        "format": FORMAT,
        "written_with": {name: version(name) for name in ("biassurgery", "torch", "transformers")},
        "patches": [
            {
                "mode": patch.mode.name,
                "modules": modules_of(patch.mode),
                "options": patch.mode.options(),
                "layers": patch.layers,
                "sites": patch.sites.header(),
                "model": find_host(model, patch.tower).facts,
            }
            for patch in applied
        ],
    }
    text = json.dumps(document, indent=1) + "\n"
    tensors = {
        f"{index}.{layer}.{name}": gathered(tensor.detach())
        for index, patch in enumerate(applied)
        for layer, edit in edits_by_layer(model, patch).items()
        for name, tensor in edit.state_dict().items()
    }
    tensors |= {
        f"{index}.{OF_MODE}{name}": tensor
        for index, patch in enumerate(applied)
        for name, tensor in patch.mode.tensors().items()
    }
    write_tensors(folder / TENSORS, tensors, {"biassurgery.patch": str(FORMAT)})
    with replacing(folder / JSON) as part:
        part.write_text(text, encoding="utf-8")


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload patches",
) -> str:
    """Upload what `save_patch` writes to a model repository of the Hugging Face hub, made if need
    be; returns the commit's address.

    Args:
        model: with patches.
        repo_id: `user/name`; `load_patch(model, repo_id)` reads it back.
        private: for a repository that is made; None: what the account's settings say.
        token: of the hub; None: the one that is logged in.
        commit_message: of the upload.

    Raises:
        NotPatched: nothing is applied.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save_patch(model, folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        )


def load_patch(model: Model, folder: str | Path) -> Model:
    """Apply what `save_patch` wrote, in place, and return the same object. All patches are applied,
    or none.

    Args:
        model: of the architecture and size that the patches were saved from.
        folder: where `save_patch` wrote; or, if there is no such folder, the `user/name` that
            `push_to_hub` uploaded to.

    Raises:
        Incompatible: written for another architecture or size; the message says what differs.
        FileError: a file is missing, truncated, or of a newer format.
        MissingPackage: a mode or a kind of bias is of a package that is neither imported nor
            installed under the entry-point group `biassurgery.extensions`.
        AlreadyPatched: one of the patches is on the model already.
    """
    hosts = every_host(model)
    folder = _local(folder)
    saved = _read(folder)
    towers: list[Tower | None] = [_matching(hosts, patch.model, folder).tower for patch in saved]
    before = patches(model)
    try:
        for patch, tower in zip(saved, towers):
            patch_model(model, patch.mode, sites=patch.sites, layers=patch.layers, tower=tower)
            _fill(model, patches(model)[-1], patch.tensors, folder)
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
    if {name: value.shape for name, value in expected.items()} != {
        name: value.shape for name, value in tensors.items()
    }:
        differ = sorted(
            name
            for name in expected.keys() | tensors.keys()
            if name not in expected
            or name not in tensors
            or expected[name].shape != tensors[name].shape
        )
        raise FileError(
            f"folder: the tensors in {folder / TENSORS} are not those of {patch.mode.name} on this"
            f" model (they differ at {', '.join(differ[:4])}); pass a folder written by"
            " save_patch()."
        )
    with torch.no_grad():
        # What state_dict gives shares its memory with the model.
        for name, value in expected.items():
            value.copy_(tensors[name])


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
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileError(
            f"folder: {folder} is neither a folder nor a repository of the hub that can be read"
            f" ({error}); check the name."
        ) from error


def _read(folder: Path) -> list[_Saved]:
    """The patches of a folder, in the order in which they were applied."""
    stored, _ = read_tensors(folder / TENSORS)
    try:
        document = json.loads((folder / JSON).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise FileError(
                f"folder: {folder} has patch format {document['format']!r}, this version reads"
                f" {FORMAT}; update biassurgery."
            )
        tensors: list[dict[str, Tensor]] = [{} for _ in document["patches"]]
        for name, tensor in stored.items():
            index, _, rest = name.partition(".")
            tensors[int(index)][rest] = tensor
        return [_patch(*pair, folder) for pair in zip(document["patches"], tensors)]
    except (FileError, MissingPackage):
        raise
    except (OSError, *CORRUPT) as error:
        raise FileError(
            f"folder: cannot read {folder / JSON} ({error!r}); pass a folder written by"
            " save_patch()."
        ) from error


def _patch(saved: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> _Saved:
    """One patch of the document. Version 0.1.0 named no modules, for all modes were its own."""
    for argument, module in saved.get("modules", {"mode": __package__}).items():
        name = saved["mode"] if argument == "mode" else saved["options"][argument]
        check_known(argument, name, module, folder)
    of_mode = {name.removeprefix(OF_MODE): tensor for name, tensor in tensors.items()}
    return _Saved(
        MODES[saved["mode"]].from_saved(saved["options"], of_mode),
        tuple(saved["layers"]),
        Sites.from_header(saved["sites"], {}),
        {name: saved["model"][name] for name in ("architecture", "layers", "width")},
        tensors,
    )
