"""Reading files of `torch.save` without running anything that is in them."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from biassurgery.errors import FileError, warn
from biassurgery.findings.files import as_path, told


def read_torch(path: str | Path) -> Any:
    """What a file of `torch.save` holds: tensors and containers of them, on the CPU.

    Raises:
        FileError: missing, truncated, damaged, or with more than tensors in it.
    """
    path = as_path("path", path)
    if not path.is_file():
        raise FileError(f"path: {path} is not a file; check the name.")
    try:
        archive = _checked(path) if zipfile.is_zipfile(path) else None
        loaded = torch.load(archive or path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of a damaged pickle raise whatever there is
        raise FileError(
            f"path: {path} cannot be read as tensors ({told(error)}); it may be truncated or"
            " damaged, or hold more than tensors."
        ) from error
    if archive is None:
        warn(
            f"path: {path} is of the format of torch before 1.6, which has no checksums, so that"
            " damage would not be noticed; torch.save() what it holds again.",
        )
    return loaded


def _checked(path: Path) -> BytesIO:
    """The zip archive that such a file is, written anew of parts that give their checksums.

    torch looks at no checksum; and one flipped bit in the directory, by which a part becomes a
    folder, makes it return memory that nothing was written to. Here it gets what was checked.
    """
    content = BytesIO()
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(content, "w") as checked:
        for part in stored.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.filename in checked.NameToInfo:
                raise ValueError(f"{part.filename} is compressed, or there twice")
            checked.writestr(part.filename, stored.read(part))
    content.seek(0)
    return content
