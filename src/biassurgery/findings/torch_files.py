"""Reading files of `torch.save` without running anything that is in them."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from biassurgery.errors import FileError
from biassurgery.findings.files import as_path, told


def read_torch(path: str | Path) -> Any:
    """What a file of `torch.save` holds: tensors and containers of them, on the CPU.

    Such a file is a zip archive, whose checksums torch itself does not look at.

    Raises:
        FileError: missing, truncated, damaged, or with more than tensors in it.
    """
    path = as_path("path", path)
    if not path.is_file():
        raise FileError(f"path: {path} is not a file; check the name.")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in it does not give its checksum")
            checked = True
        else:
            checked = False
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers of a damaged pickle raise whatever there is
        raise FileError(
            f"path: {path} cannot be read as tensors ({told(error)}); it may be truncated or"
            " damaged, or hold more than tensors."
        ) from error
    if not checked:
        warnings.warn(
            f"path: {path} is of the format of torch before 1.6, which has no checksums, so that"
            " damage would not be noticed; torch.save() what it holds again.",
            stacklevel=3,
        )
    return loaded
