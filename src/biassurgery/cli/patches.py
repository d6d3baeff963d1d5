"""A saved patch on a model for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def with_patch(model: Any, folder: Path | None) -> Iterator[None]:
    """The model with the patch of a folder within the block; None: as it is."""
    from biassurgery.patching import unpatch_model
    from biassurgery.saving.load import load_patch

    if folder is None:
        yield
        return
    load_patch(model, folder)
    try:
        yield
    finally:
        unpatch_model(model)
