"""`save_patch` and `push_to_hub`: what is applied to a model becomes a folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from biassurgery.adapters.parallel import gathered
from biassurgery.adapters.registry import find_host
from biassurgery.errors import NotPatched
from biassurgery.findings.files import as_path
from biassurgery.measure.together import together
from biassurgery.modes.saved import modules_of
from biassurgery.patching import patches
from biassurgery.patching.applied import check_in_place, edits_by_layer
from biassurgery.saving.document import OF_MODE
from biassurgery.saving.folder import FORMAT, as_text, write_folder


def save_patch(model: nn.Module, folder: str | Path) -> None:
    """Write every patch of a model to a folder: what it does, where, on which architecture.

    `surgery.safetensors` holds all of it and is what `load_patch` goes by; `surgery.json` says the
    same for people to read. An older patch in the folder stays whole until the new one is.

    On a model that ranks run together every rank has to call it, to gather the tensors. The lowest
    of them writes the files, which load on any number of ranks, and the others return when it has.

    Args:
        model: with patches.
        folder: to write to; it is made.

    Raises:
        NotPatched: nothing is applied.
        Incompatible: blocks have come, gone or moved since a patch was applied.
        BadOption: a patch whose class could not be found again by its name, or with an option that
            cannot be saved.
        FileError: the folder cannot be written.
        RankFailed: another of the ranks that run this model together has failed, or does not
            answer; what was in the folder is there still.
    """
    with together("save_patch", model) as ranks:
        path = as_path("folder", folder)
        document = _document(model)
        ranks.same(folder=str(path.absolute()), patches=as_text(document))  # all have come so far
        tensors = _tensors(model)
        ranks.by_one(lambda: write_folder(path, document, tensors))


def _document(model: nn.Module) -> dict[str, Any]:
    """What is applied to a model, for `surgery.json`."""
    applied = patches(model)
    if not applied:
        raise NotPatched(
            "model: nothing is applied, so there is nothing to save; patch_model(model, ...) first."
        )
    for patch in applied:
        check_in_place(model, patch)
    return {
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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of all patches, whole: the ranks that have parts of them gather them."""
    applied = patches(model)
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
    return tensors


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
        RankFailed: another of the ranks that run this model together has failed.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses.
    """
    from huggingface_hub import HfApi

    with together("push_to_hub", model) as ranks:
        document = _document(model)
        ranks.same(repo_id=repo_id, patches=as_text(document))
        tensors = _tensors(model)

        def upload() -> str:
            api = HfApi(token=token)
            with TemporaryDirectory() as folder:
                write_folder(Path(folder), document, tensors)
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message
                )
            return str(commit)

        return ranks.by_one(upload)
