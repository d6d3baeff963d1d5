"""The document of a saved patch, back to what it says; nothing in it is taken for granted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from biassurgery.errors import BadOption, FileError
from biassurgery.findings.fields import items, whole, words
from biassurgery.findings.files import CORRUPT, told
from biassurgery.findings.sites import Sites
from biassurgery.modes import MODES, Mode
from biassurgery.modes.saved import check_known

# in front of the names of tensors that belong to a mode, not to an edit of a layer
OF_MODE = "mode."
_OURS = __name__.partition(".")[0]


@dataclass(frozen=True)
class Saved:
    """One patch of a folder: what it does, where, of which model it is, and its tensors."""

    mode: Mode
    layers: tuple[int, ...]
    sites: Sites
    model: dict[str, Any]
    tensors: dict[str, Tensor]


def saved_patches(document: dict[str, Any], stored: dict[str, Tensor], folder: Path) -> list[Saved]:
    """The patches of a folder, in the order in which they were applied.

    Raises:
        FileError: the document or the tensors are not those of a patch.
        MissingPackage: a mode or a kind of bias is of a package that is not here.
    """
    try:
        patches = items("patches", document["patches"])
        tensors: list[dict[str, Tensor]] = [{} for _ in patches]
        for name, tensor in stored.items():
            index, _, rest = name.partition(".")
            if not index.isdecimal():  # -1 would be the last patch
                raise ValueError(f"{name} is the tensor of no patch")
            tensors[int(index)][rest] = tensor
        return [_patch(*pair, folder) for pair in zip(patches, tensors)]
    except CORRUPT as error:
        raise FileError(
            f"folder: {folder} does not hold a patch that can be read ({told(error)}); pass a"
            " folder written by save_patch()."
        ) from error


def _patch(saved: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> Saved:
    """One patch of the document. Version 0.1.0 named no modules, for all modes were its own."""
    for argument, module in saved.get("modules", {"mode": _OURS}).items():
        name = saved["mode"] if argument == "mode" else saved["options"][argument]
        check_known(argument, words(argument, name), words("module", module), folder)
    model = {
        "architecture": words("architecture", saved["model"]["architecture"]),
        "layers": whole("layers", saved["model"]["layers"], 1),
        "width": whole("width", saved["model"]["width"], 1),
    }
    sites = Sites.from_header(saved["sites"], {})
    layers = tuple(whole("layer", layer) for layer in items("layers", saved["layers"]))
    reached = max((*layers, *sites.layers()), default=0)
    channel = max((site.channel for site in sites), default=0)
    if reached >= model["layers"] or channel >= model["width"]:
        raise BadOption(
            f"patches: layer {reached} or channel {channel} is beyond a model of {model['layers']}"
            f" layers and {model['width']} channels."
        )
    of_mode = {name.removeprefix(OF_MODE): tensor for name, tensor in tensors.items()}
    mode = MODES[saved["mode"]].from_saved(saved["options"], of_mode)
    return Saved(mode, layers, sites, model, tensors)
