"""The code in the documents runs as it stands, on small models with planted values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from tests import models, vision
from tests.checkpoints import tokenizer

DOCS = Path(__file__).parents[2] / "docs"


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


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
    blocks = blocks_of("guide.md")
    assert len(blocks) >= 5
    for number, block in enumerate(blocks):
        exec(compile(block, f"guide.md, block {number + 1}", "exec"), names)
    assert bs.patches(names["model"]) == bs.patches(names["vit"]) == ()
    assert bs.patches(names["other"])
    assert len(names["sites"]) > 0
    for file in ("magnitudes.png", "positions.png", "sites.safetensors", "patch/surgery.json"):
        assert Path(file).stat().st_size > 0


def test_the_page_on_the_start_token(capsys: pytest.CaptureFixture[str]) -> None:
    """With a start token that the small model's tokenizer has; without it the value is missing."""
    (block,) = blocks_of("bos.md")
    names = what_the_guide_has()
    names["tokenizer"] = tokenizer(bos=False)
    names["batches"] = [batch[:, 1:] for batch in names["batches"]]
    exec(compile(block.replace("<|im_start|>", "<s>"), "bos.md", "exec"), names)
    without, behind = map(float, capsys.readouterr().out.split())
    whole = [torch.nn.functional.pad(batch, (1, 0)) for batch in names["batches"]]
    labels = [batch.index_fill(1, torch.tensor([0, 1]), -100) for batch in whole]
    scored = [{"input_ids": ids, "labels": kept} for ids, kept in zip(whole, labels)]
    assert behind == pytest.approx(bs.perplexity(names["model"], scored))
    assert without == pytest.approx(bs.perplexity(names["model"], names["batches"]))
    assert names["sites"].origin.start_token == 0
    assert torch.equal(names["inputs"]["input_ids"], whole[0])
