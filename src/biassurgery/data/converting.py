"""A checkpoint as a plain folder, which `from_pretrained` reads wherever it was from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biassurgery.data.loading import Loaded, load_model
from biassurgery.data.versions import name_for_both
from biassurgery.errors import BadOption
from biassurgery.findings.files import as_path, check_new, new_folder


def convert(source: str, folder: str | Path, *, dtype: str | None = None) -> Loaded:
    """Write a model and its tokenizer to a folder: config.json, safetensors and tokenizer files.

    Weights that were quantised in a GGUF file are written as the floating-point numbers that they
    stand for. The folder gets its name when it is complete.

    Args:
        source: what `load_model` takes, of transformers: a GGUF file, a folder, or a hub name.
        folder: a new one.
        dtype: `float32`, `bfloat16` or `float16`; None: the checkpoint's own, float32 for GGUF.

    Returns:
        What was written.

    Raises:
        BadOption: a timm model, which has no such form.
        FileError: the source cannot be loaded, or the folder is there already or not be written.
        MissingPackage: a GGUF file, and gguf is not installed.
    """
    path = as_path("folder", folder)
    check_new(path, "folder")
    loaded = load_model(source, dtype=dtype, device="cpu")
    model: Any = loaded.model
    if not hasattr(model, "save_pretrained"):
        raise BadOption(f"source: {source!r} is a timm model; give one of transformers.")
    with new_folder(path) as part:
        model.save_pretrained(part)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(part)
        name_for_both(part)
    return loaded
