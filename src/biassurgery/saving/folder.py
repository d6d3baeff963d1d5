"""The two files of a saved patch, of which one decides.

`surgery.safetensors` holds the whole patch: its tensors and, as JSON in its metadata, the document
(which modes, where, of which model), under one checksum. It is replaced by one rename. Beside it,
`surgery.json` is the document for people to read, with the checksum of the tensors file that it was
written with. So what they disagree about has a name:

    the same checksum, another document    surgery.json was edited or damaged: refused, for whoever
                                           edited it expects to have changed something
    another checksum                       it is of another save, as after one that was interrupted
                                           between the two renames: a warning

In a folder of an earlier version the document is in `surgery.json` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from biassurgery.errors import BadOption, FileError, warn
from biassurgery.findings.files import (
    CHECKSUM,
    CORRUPT,
    checksum_of,
    parse_json,
    read_json,
    read_tensors,
    replacing,
    save_tensors,
    told,
)

FORMAT = 1
JSON = "surgery.json"
TENSORS = "surgery.safetensors"
_KEY = (
    "biassurgery.patch"  # of the document among the metadata; of earlier versions the format alone
)
_SHA256 = "sha256"  # in surgery.json
_ADVICE = "pass a folder written by save_patch()"


def as_text(document: dict[str, Any]) -> str:
    """The document of a patch as JSON.

    Raises:
        BadOption: JSON cannot hold it.
    """
    try:
        return json.dumps(document)
    except (TypeError, ValueError) as error:
        raise BadOption(
            f"model: an option of its patches cannot be saved ({error}); a mode's options() must"
            " give what JSON can hold."
        ) from error


def write_folder(folder: Path, document: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files; what was there before is there until both new ones are complete.

    Raises:
        BadOption: JSON cannot hold the document.
        FileError: they cannot be written.
    """
    metadata = {_KEY: as_text(document)}
    # The tensors are the inner ones, whose rename comes first.
    with replacing(folder / JSON, "folder") as notes, replacing(folder / TENSORS, "folder") as part:
        checksum = save_tensors(part, tensors, metadata)
        text = json.dumps(document | {_SHA256: checksum}, indent=1) + "\n"
        notes.write_text(text, encoding="utf-8")


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Document and tensors of a saved patch; of the document nothing but its format is checked.

    Raises:
        FileError: a file is missing, damaged, or of a newer format; or they disagree.
    """
    tensors, metadata = read_tensors(folder / TENSORS, "folder")
    try:
        document = parse_json(metadata.get(_KEY, "0"))
    except CORRUPT as error:
        raise FileError(
            f"folder: {folder / TENSORS} holds no patch that can be read ({told(error)});"
            f" {_ADVICE}."
        ) from error
    if type(document) is int:  # the bare format, or no metadata at all
        document = _document_beside(folder, tensors)
    else:
        _check_notes(folder, document, metadata.get(CHECKSUM))
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise FileError(f"folder: {folder} holds no patch that can be read; {_ADVICE}.")
    if document["format"] != FORMAT:
        raise FileError(
            f"folder: {folder} has patch format {document['format']!r}, this version reads"
            f" {FORMAT}; update biassurgery."
        )
    return document, tensors


def _document_beside(folder: Path, tensors: Mapping[str, Tensor]) -> Any:
    """The document of tensors that come without it."""
    document = read_json(folder / JSON, "folder", _ADVICE)
    if isinstance(document, dict) and _SHA256 in document:
        # Some program has lost the metadata on the way.
        said = document.pop(_SHA256)
        if said != checksum_of(tensors, {_KEY: json.dumps(document)}):
            raise FileError(
                f"folder: {folder / JSON} is not of the patch in {folder / TENSORS}, or one of them"
                " was changed; take both from one folder."
            )
        return document
    warn(
        f"folder: {folder} is of an earlier version, whose files have no checksum: whether"
        f" {JSON} and {TENSORS} are of one patch, and undamaged, is not known; save_patch(model,"
        " folder) writes them anew.",
    )
    return document


def _check_notes(folder: Path, document: Any, checksum: str | None) -> None:
    """Look at what people read: does it say what decides?"""
    if checksum is None:
        raise FileError(f"folder: {folder / TENSORS} has lost its checksum; {_ADVICE}.")
    path = folder / JSON
    if not path.exists() and not path.is_symlink():
        return  # the patch is whole without it
    advice = f"delete it, for {TENSORS} holds the whole patch"
    notes = read_json(path, "folder", advice)
    is_document = isinstance(notes, dict) and "patches" in notes
    if is_document and notes.pop(_SHA256, None) != checksum:
        warn(
            f"folder: {path} is of another save than {TENSORS}, which decides; save_patch(model,"
            " folder) writes both anew.",
        )
    elif _text(notes) != _text(document):
        raise FileError(
            f"folder: {path} was changed after it had been saved, which changes nothing: {TENSORS}"
            f" decides. {advice.capitalize()}; to change a patch, apply another one and save it."
        )


def _text(document: Any) -> str:
    """One text for each document: NaN is equal to NaN in it."""
    return json.dumps(document, sort_keys=True)
