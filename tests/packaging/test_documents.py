"""The code in the documents runs as it stands, on small models with planted values."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import biassurgery as bs
from biassurgery.data.packaged import packaged_text
from tests import models, vision
from tests.checkpoints import checkpoint, tokenizer

DOCS = Path(__file__).parents[2] / "docs"


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)


def run_page(page: str, names: dict[str, Any], instead: Mapping[str, str] = {}) -> None:
    """All blocks of a page in one namespace, with other words for what a small model has not."""
    blocks = blocks_of(page)
    assert blocks
    for number, block in enumerate(blocks):
        for word, other in {"<|im_start|>": "<s>", **instead}.items():
            block = block.replace(word, other)
        exec(compile(block, f"{page}, block {number + 1}", "exec"), names)


def without_a_start_token() -> dict[str, Any]:
    """What the guide has, with a tokenizer that adds no BOS."""
    names = what_the_guide_has()
    names["tokenizer"] = tokenizer(bos=False)
    names["batches"] = [batch[:, 1:] for batch in names["batches"]]
    return names


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
    assert len(blocks_of("guide.md")) >= 6
    run_page("guide.md", names)
    assert bs.patches(names["model"]) == bs.patches(names["vit"]) == ()
    assert bs.patches(names["other"])
    assert len(names["sites"]) > 0
    for file in ("magnitudes.png", "positions.png", "sites.safetensors", "patch/surgery.json"):
        assert Path(file).stat().st_size > 0
    assert names["diagnosis"].super_weights
    assert names["keep"].shape == names["batch"]["input_ids"].shape
    assert not names["keep"][:, 0].any()
    assert "massive activations: up to" in Path("report.html").read_text()


def test_the_page_on_the_start_token(capsys: pytest.CaptureFixture[str]) -> None:
    """With a start token that the small model's tokenizer has; without it the value is missing."""
    names = without_a_start_token()
    run_page("bos.md", names)
    without, behind = map(float, capsys.readouterr().out.split())
    whole = [torch.nn.functional.pad(batch, (1, 0)) for batch in names["batches"]]
    labels = [batch.index_fill(1, torch.tensor([0, 1]), -100) for batch in whole]
    scored = [{"input_ids": ids, "labels": kept} for ids, kept in zip(whole, labels)]
    assert behind == pytest.approx(bs.perplexity(names["model"], scored))
    assert without == pytest.approx(bs.perplexity(names["model"], names["batches"]))
    assert names["sites"].origin.start_token == 0
    assert torch.equal(names["inputs"]["input_ids"], whole[0])


def test_the_page_on_calibration() -> None:
    names = without_a_start_token()
    names["text"] = packaged_text("evaluation")[:2000]
    run_page("calibration.md", names)
    assert names["after"] == pytest.approx(names["before"], rel=1e-2)
    assert names["key_values"].start == names["sites"].origin.start == 0
    assert names["inputs"]["input_ids"][0, 0] == 0


def test_the_page_on_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a factor that is said: the small model fits float16 as it is."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "small", bos=True)
    names = what_the_guide_has()
    instead = {
        "google/gemma-3-270m": "small",
        '"rescale")  # factor="auto"': '"rescale", factor=0.5)',
    }
    run_page("float16.md", names, instead)
    whole = {name: names[name].model.embed_tokens.weight.float() for name in ("model", "half")}
    torch.testing.assert_close(whole["half"], whole["model"] / 2, atol=1e-3, rtol=1e-3)
    assert names["half"].dtype == torch.float16


# transformers 4 has no class with sinks for LLaMA
WITHOUT_SINKS = {'format="sinks", batches=texts': 'format="prefix"'}


def test_the_page_on_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "served").mkdir()  # a folder that is not there yet is remembered as such
    monkeypatch.syspath_prepend(tmp_path / "served")
    names = what_the_guide_has()
    whole = names["batch"]["input_ids"]
    names |= {"ids": whole[:, 1:], "attention_mask": torch.ones_like(whole[:, 1:])}
    instead = {} if hasattr(transformers, "GraniteSWAForCausalLM") else WITHOUT_SINKS
    run_page("serving.md", names, instead)
    del sys.modules["prefix"]
    wanted = names["model"](whole).logits[:, 1:]
    torch.testing.assert_close(names["logits"], wanted, atol=1e-3, rtol=1e-3)
    assert names["sequences"].shape == (len(whole), whole.shape[1] - 1 + 20)


def test_the_page_on_quantisation() -> None:
    names = without_a_start_token()
    layer = f"layers.{models.LAYER}/mlp/down_proj"
    nodes = [f"/model/{layer}/MatMul", "/lm_head/MatMul"]
    names["graph"] = SimpleNamespace(node=[SimpleNamespace(name=name) for name in nodes])
    run_page("quantisation.md", names)
    assert names["found"].ignore() == [f"model.{layer}".replace("/", ".")]
