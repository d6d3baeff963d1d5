"""The commands behind docs/real.md on a planted model: they say what plain forwards do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import any_token  # noqa: E402
import published  # noqa: E402

from biassurgery.data.real_models import model_folder  # noqa: E402
from tests.checkpoints import checkpoint, tokenizer  # noqa: E402
from tests.models import CHANNEL, LAYER, VOCAB  # noqa: E402


def test_any_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(any_token, "LENGTH", 64)
    model: Any = checkpoint(tmp_path, bos=True)
    found = any_token.examine(model, tokenizer(bos=True), None, None)
    assert (found["layer"], found["channel"], found["tokens"]) == (LAYER, CHANNEL, VOCAB)
    with torch.no_grad():
        states = model(torch.arange(VOCAB)[:, None], output_hidden_states=True).hidden_states
    magnitudes = states[LAYER + 1][:, 0, CHANNEL].abs()
    assert found["without"] == int((magnitudes <= found["threshold"]).sum())
    assert 0 < found["without"] < VOCAB
    assert found["quantiles"]["1.0"] == pytest.approx(magnitudes.max().item(), rel=1e-5)
    assert found["quantiles"]["0.5"] == pytest.approx(magnitudes.median().item(), rel=0.2)
    sampled = any_token.examine(model, tokenizer(bos=True), 10, LAYER)
    assert sampled["tokens"] == 10
    any_token.show("planted", found)
    shown = capsys.readouterr().out
    assert f"all but {found['without']}" in shown


def test_published_sites_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = published.published_rows()
    assert len(rows) == 18
    named = {row[0]: row for row in rows}
    assert named["meta-llama/Llama-2-7b-hf"][2] == "1415, 1512, 2533"
    monkeypatch.setenv("BIASSURGERY_CACHE", str(tmp_path))
    monkeypatch.setattr(published, "LENGTH", 64)
    assert published.measured_rows() == []
    checkpoint(model_folder("smollm2"), bos=True)
    (ours,) = published.measured_rows()
    assert ours[0] == "SmolLM2-135M-Instruct (dequantised GGUF)"
    assert ours[1].startswith(f"{LAYER} to ")
    assert str(CHANNEL) in ours[2].split(", ")
    assert "start" in ours[3]
    assert ours[5].endswith("x")
