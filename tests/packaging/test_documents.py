"""The code in the guide runs as it stands, on small models with planted values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from tests import models, vision

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)


def what_the_guide_has() -> dict[str, Any]:
    """The names that the guide takes for granted."""
    text = [models.tokens(seed=seed) for seed in (1, 2)]
    pictures = vision.images(8)
    return {
        "bs": bs,
        "model": models.planted("llama"),
        "other": models.planted("llama"),
        "batches": text,
        "batch": {"input_ids": text[0]},
        "tokens": torch.cat([row.flatten() for row in text * 4]),
        "vit": vision.planted("timm_vit"),
        "images": pictures,
        "loader": [(pictures, torch.zeros(len(pictures), dtype=torch.long))],
    }


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace for all blocks, as for a reader; and it leaves nothing on the models."""
    monkeypatch.chdir(tmp_path)
    names = what_the_guide_has()
    assert len(BLOCKS) >= 5
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"guide.md, block {number + 1}", "exec"), names)
    assert bs.patches(names["model"]) == bs.patches(names["vit"]) == ()
    assert bs.patches(names["other"])
    assert len(names["sites"]) > 0
    for file in ("magnitudes.png", "positions.png", "sites.safetensors", "patch/surgery.json"):
        assert Path(file).stat().st_size > 0
