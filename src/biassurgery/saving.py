"""`save_patch` and `load_patch`: the patches of a model in a small folder, without the model."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from biassurgery.adapters.registry import find_host
from biassurgery.errors import FileError, IncompatibleSites, NotPatched, SurgeryError
from biassurgery.files import read_tensors, write_tensors
from biassurgery.modes import MODES
from biassurgery.patching import Model, Patch, patch_model, patches, remove
from biassurgery.sites import Sites

FORMAT = 1
JSON, TENSORS = "surgery.json", "surgery.safetensors"


def save_patch(model: nn.Module, folder: str | Path) -> None:
    """Write every patch of a model to `surgery.json` (what, where, on which architecture) and `surgery.safetensors` (its tensors).

    Raises:
        NotPatched: nothing is applied.
        FileError: the folder cannot be written.
    """
    host, applied, folder = find_host(model), patches(model), Path(folder)
    if not applied:
        raise NotPatched("model: nothing is applied, so there is nothing to save; patch_model(model, ...) first.")
    document = {
        "format": FORMAT,
        "architecture": host.architecture, "layers": len(host.blocks), "width": host.width,
        "written_with": {name: version(name) for name in ("biassurgery", "torch", "transformers")},
        "patches": [{"mode": patch.mode.name, "options": asdict(patch.mode), "layers": patch.layers,  # type: ignore[call-overload]
                     "sites": patch.sites.header()} for patch in applied],
    }
    text = json.dumps(document, indent=1) + "\n"
    write_tensors(folder / TENSORS, {}, {"biassurgery.patch": str(FORMAT)})
    try:
        (folder / JSON).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileError(f"folder: cannot write {folder / JSON} ({error}); choose a folder that can be written to.") from error


def load_patch(model: Model, folder: str | Path) -> Model:
    """Apply what `save_patch` wrote, in place, and return the same object. All patches are applied, or none.

    Raises:
        IncompatibleSites: written for another architecture or size; the message says what differs.
        FileError: a file is missing, truncated, or of a newer format.
        AlreadyPatched: one of the patches is on the model already.
    """
    host, folder = find_host(model), Path(folder)
    theirs, saved = _read(folder)
    for name, ours in (("architecture", host.architecture), ("layers", len(host.blocks)), ("width", host.width)):
        if theirs[name] != ours:
            raise IncompatibleSites(f"folder: {folder} holds patches for {name} {theirs[name]!r}, this model's is {ours!r}; load them "
                                    "onto the kind of model that they were saved from.")
    before = patches(model)
    try:
        for patch in saved:
            patch_model(model, patch.mode, sites=patch.sites, layers=patch.layers)
    except SurgeryError:
        remove(host, [patch for patch in patches(model) if all(patch is not p for p in before)])
        raise
    return model


def _read(folder: Path) -> tuple[dict[str, Any], list[Patch]]:
    """What the patches are for (architecture, layers, width), and the patches."""
    read_tensors(folder / TENSORS)  # a truncated or missing file is an error even where no mode keeps tensors in it
    try:
        document = json.loads((folder / JSON).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise FileError(f"folder: {folder} has patch format {document['format']!r}, this version reads {FORMAT}; update biassurgery.")
        unknown = {saved["mode"] for saved in document["patches"]} - set(MODES)
        if unknown:
            raise FileError(f"folder: {folder} holds modes that this version does not know: {sorted(unknown)}; update biassurgery.")
        return {name: document[name] for name in ("architecture", "layers", "width")}, [_patch(saved) for saved in document["patches"]]
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"folder: cannot read {folder / JSON} ({error!r}); pass a folder written by save_patch().") from error


def _patch(saved: dict[str, Any]) -> Patch:
    mode = MODES[saved["mode"]]
    return Patch(mode(**_as_fields(mode, saved["options"])), tuple(saved["layers"]), Sites.from_header(saved["sites"], {}))


def _as_fields(mode: type, options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON gave them, lists back to tuples."""
    known = {field.name for field in fields(mode)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items() if name in known}
