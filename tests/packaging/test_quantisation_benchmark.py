"""The benchmark of quantisation, on a tiny checkpoint: cells are kept, and it goes on from them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

import biassurgery as bs
from biassurgery.data.packaged import packaged_text
from tests.checkpoints import checkpoint, tokenizer
from tests.models import planted

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quantisation

ROWS = ["float32", "static, quantile", "torchao static, SmoothQuant", "weights int3"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["quantisation.py", *map(str, arguments)])
    quantisation.main()


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    checkpoint(tmp_path / "model", bos=True)
    (tmp_path / "text.txt").write_text(packaged_text("evaluation")[:3000])
    sizes = ("--windows", 3, "--length", 32, "--seeds", 2)
    files = ("--text", tmp_path / "text.txt", "--keep", tmp_path / "cells.json")
    return [tmp_path / "model", *files, *sizes, "--rows", *ROWS, "--columns", "as it is"]


def test_cells_are_kept_and_gone_on_from(command, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *command)
    cells = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert len(cells) == 2 + 2 * 2  # two rows depend on what they are calibrated on
    assert all(len(losses) == 3 for losses in cells.values())
    assert len({tuple(losses) for losses in cells.values()}) == len(cells)
    words = tokenizer(bos=False)(packaged_text("evaluation")[:3000])["input_ids"]
    window = [0, *words[:31]]
    batch = {"input_ids": quantisation.torch.tensor([window])}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :2] = -100
    plain = math.log(bs.perplexity(planted("llama"), [batch], progress=False))
    assert cells["float32 | as it is | 0"][0] == pytest.approx(plain, rel=1e-5)
    first = capsys.readouterr().out
    monkeypatch.setattr(quantisation, "measure", None)  # nothing is left to be measured
    run(monkeypatch, *command)
    again = capsys.readouterr().out
    assert again == first[first.index("| | as it is |") :]
    assert again.count("\n") == 2 + len(ROWS)
    with pytest.raises(SystemExit, match="give another --keep"):
        run(monkeypatch, *command[:-2], "--windows", 2)


def test_an_interval_is_that_of_differences():
    """Windows differ much from each other, and alike in both: the interval is of a point."""
    control = [[1.0, 3.0, 5.0]]
    text = quantisation.cell([[1.5, 3.5, 5.5]], control)
    assert text == f"{math.exp(3.5):.4g}, 1.65x (1.65-1.65)"
    assert quantisation.cell(control, control) == f"{math.exp(3):.4g}"
    wide = quantisation.cell([[1.5, 3.5, 6.5], [1.5, 3.5, 6.5]], control)
    low, high = wide.split("(")[1].split(")")[0].split("-")
    assert float(low) < 2.3 < float(high)
    assert "seeds" in wide
