"""The command behind docs/float16.md, on a model whose float16 overflows."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import biassurgery as bs
from biassurgery.data.packaged import packaged_text
from tests.checkpoints import checkpoint, tokenizer
from tests.models import planted

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import float16  # noqa: E402

TEXT = packaged_text("evaluation")[:3000]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """On a checkpoint whose stream is larger than float16 holds, and on the same made smaller."""
    model = planted("llama")
    checkpoint(tmp_path / "large", bos=True)
    bs.patch_model(model, "rescale", factor=2.0**8, batches=torch.arange(3, 40)[None])
    model.save_pretrained(tmp_path / "large")
    bs.unpatch_model(model)
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "text.txt").write_text(TEXT)
    files = ["--text", tmp_path / "text.txt", "--keep", tmp_path / "kept.json"]
    sizes = ["--windows", 2, "--length", 24]
    return [str(part) for part in (tmp_path / "large", tmp_path / "small", *files, *sizes)]


def rows(command: list[str], monkeypatch, capsys) -> dict[tuple[str, str], list[str]]:
    """The table, by checkpoint and dtype."""
    monkeypatch.setattr(sys, "argv", ["float16.py", *command])
    float16.main()
    lines = [line.strip("| ").split(" |") for line in capsys.readouterr().out.splitlines()[2:]]
    found = [[part.strip() for part in line] for line in lines]
    return {(line[0], line[1]): line[2:] for line in found}


def expected() -> float:
    """The perplexity of the planted model, written out."""
    ids = tokenizer(bos=False)(TEXT)["input_ids"]
    windows = torch.tensor([[0, *ids[:23]], [0, *ids[23:46]]])
    with torch.no_grad():
        logits = planted("llama")(windows).logits
    return math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


def test_which_windows_are_finite(command, tmp_path, monkeypatch, capsys):
    found = rows(command, monkeypatch, capsys)
    assert found["large", "float32"][0] == "2 of 2"
    assert float(found["large", "float32"][1]) == pytest.approx(expected(), rel=1e-5)
    assert found["large", "float16"][:2] == ["0 of 2", "NaN"]
    assert found["small", "float16"][0] == "2 of 2"
    perplexity, more = float(found["small", "float16"][1]), found["small", "float16"][2]
    assert perplexity == pytest.approx(expected(), rel=1e-2)
    assert float(more.strip("%")) == pytest.approx(100 * (perplexity / expected() - 1), abs=2e-3)
    monkeypatch.setattr(float16, "loss_of", None)  # nothing is left to be scored
    assert rows(command, monkeypatch, capsys) == found
    with pytest.raises(SystemExit, match="give another --keep"):
        rows([*command, "--length", "16"], monkeypatch, capsys)


def test_it_does_without_this_library():
    assert "import biassurgery" not in (source := (BENCHMARKS / "float16.py").read_text())
    assert "from biassurgery" not in source
