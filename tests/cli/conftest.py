"""A checkpoint and a text for the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from biassurgery.data.packaged import packaged_text
from tests.checkpoints import checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted LLaMA with a tokenizer that puts BOS in front, and a text beside it."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoint(folder, bos=True)
    (folder / "text.txt").write_text(packaged_text("evaluation")[:2000])
    return folder
