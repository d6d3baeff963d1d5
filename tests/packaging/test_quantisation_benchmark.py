"""The benchmark of quantisation, on a tiny checkpoint: cells are kept, and it goes on from them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import cache_utils

import biassurgery as bs
from biassurgery.data.packaged import packaged_text
from tests.checkpoints import checkpoint, tokenizer
from tests.models import planted

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quantisation
from quantised import caches, intervals, remedies
from quantised.windows import NO_START, Data, windows

ROWS = ["float32", "static, quantile", "torchao static", "weights int3"]
COLUMNS = ["as it is", "ignore list + SmoothQuant", "transplant"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["quantisation.py", *map(str, arguments)])
    quantisation.main()


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    checkpoint(tmp_path / "model", bos=True)
    (tmp_path / "text.txt").write_text(packaged_text("evaluation")[:3000])
    sizes = ("--windows", 3, "--length", 32, "--seeds", 2)
    files = ("--text", tmp_path / "text.txt", "--keep", tmp_path / "cells.json")
    return [tmp_path / "model", *files, *sizes, "--rows", *ROWS, "--columns", *COLUMNS]


def test_cells_are_kept_and_gone_on_from(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("quantised.roundings.GROUP", 16)
    run(monkeypatch, *command)
    kept = json.loads((tmp_path / "cells.json").read_text())
    cells = kept["cells"]
    # two rows depend on what they are calibrated on
    assert len(cells) == 2 + 2 + 2 * 2 * 3
    assert all(len(losses) == 3 for losses in cells.values())
    apart = {name: losses for name, losses in cells.items() if not name.startswith("float32")}
    assert len({tuple(losses) for losses in apart.values()}) == len(apart)
    assert set(kept["quantiles"]) == {name for name in cells if "static" in name}
    words = tokenizer(bos=False)(packaged_text("evaluation")[:3000])["input_ids"]
    window = [0, *words[:31]]
    batch = {"input_ids": torch.tensor([window])}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :2] = -100
    plain = math.log(bs.perplexity(planted("llama"), [batch], progress=False))
    assert cells["float32 | as it is | 0"][0] == pytest.approx(plain, rel=1e-5)
    # what the start token gives is exact: no token misses it
    assert cells["float32 | transplant | 0"] == pytest.approx(
        cells["float32 | as it is | 0"], rel=1e-4
    )
    first = capsys.readouterr().out
    monkeypatch.setattr(quantisation, "measure", None)  # nothing is left to be measured
    run(monkeypatch, *command)
    again = capsys.readouterr().out
    assert again == first[first.index("| | as it is |") :]
    assert again.count("\n") == 2 + len(ROWS)
    with pytest.raises(SystemExit, match="give another --keep"):
        run(monkeypatch, *command, "--windows", 2)


@pytest.mark.parametrize("other", [False, True])
def test_no_token_that_is_scored_calibrates(tmp_path, other):
    """Also where both are of one text: the eight begin behind what is scored."""
    read = {"scored": "one two three four", "other": "five six seven eight"}
    for name, words in read.items():
        (tmp_path / name).write_text(words)

    def ids(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        first = 1000 * (text == read["other"])
        return {"input_ids": list(range(first, first + 100))}

    loaded = SimpleNamespace(tokenizer=ids, model=torch.nn.Linear(1, 1))
    loaded.model.device = "cpu"
    options = SimpleNamespace(
        text=str(tmp_path / "scored"),
        calibration=str(tmp_path / ("other" if other else "scored")),
        start=NO_START,
        windows=5,
        length=8,
    )
    data = windows(loaded, options, seed=0)
    assert torch.cat(data.scored, 1).flatten().tolist() == list(range(40))
    eight = [row.flatten().tolist() for row in (*data.calibration, *data.held)]
    assert len(eight) == 8
    assert min(map(min, eight)) >= (1000 if other else 40)
    assert all(row == list(range(row[0], row[0] + 8)) for row in eight)


def test_an_interval_is_that_of_differences():
    """Windows differ much from each other, and alike in both: the interval is of a point."""
    control = [[1.0, 3.0, 5.0]]
    text = intervals.cell([[1.5, 3.5, 5.5]], control)
    assert text == f"{math.exp(3.5):.4g}, 1.65x (1.65-1.65)"
    assert intervals.cell(control, control) == f"{math.exp(3):.4g}"
    wide = intervals.cell([[1.5, 3.5, 6.5], [1.5, 3.5, 6.5]], control)
    low, high = wide.split("(")[1].split(")")[0].split("-")
    assert float(low) < 2.3 < float(high)
    assert "seeds" in wide


def test_smoothing_is_what_smoothquant_says():
    """s = max|x|^a / max|w|^(1 - a) by channel; inputs are divided by it."""
    model = planted("llama")
    ids = torch.randint(3, 50, (1, 24), generator=torch.Generator().manual_seed(0))
    found = remedies.smoothing(model, [ids], 0.5)
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    read: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    largest = read[0].abs().amax((0, 1))
    expected = (layer.weight.abs().amax(0) / largest).sqrt()
    torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)
    assert not found[name].allclose(torch.ones_like(expected), rtol=0.1)


class Coarse(cache_utils.QuantizedLayer):
    """Keys and values to a whole number of steps, which `nbits` divides into."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return (tensor * 2.0**self.nbits).round() / 2.0**self.nbits

    def _dequantize(self, qtensor: Tensor) -> Tensor:
        return qtensor


def test_a_quantised_cache_is_read_behind_the_first_piece(monkeypatch):
    monkeypatch.setattr(cache_utils, "Coarse", Coarse, raising=False)
    kinds = {f"{bits}": caches.Kind("torch", "Coarse", bits) for bits in (-3, 20)}
    monkeypatch.setattr(caches, "KINDS", kinds)
    monkeypatch.setattr(caches, "PIECE", 8)
    model = planted("llama")
    row = torch.cat([torch.zeros(1, 1), torch.randint(3, 50, (1, 31))], 1).long()
    (plain,) = quantisation.losses(model, [row], 0)
    (fine,) = caches.losses(model, [row], 0, "20")
    (coarse,) = caches.losses(model, [row], 0, "-3")
    assert fine == pytest.approx(plain, rel=1e-4)
    assert abs(coarse - plain) > 1e-3
    key_values = bs.calibrate_key_values(model, [row], progress=False)
    with bs.patched(model, "transplant", key_values=key_values):
        (moved,) = caches.losses(model, [row], 1, "20")
    assert moved == pytest.approx(plain, rel=1e-4)
    (alone,) = caches.losses(model, [row[:, :8]], 0, "-3")  # a piece reads its own in floats
    assert alone == pytest.approx(quantisation.losses(model, [row[:, :8]], 0)[0], rel=1e-4)


def test_a_package_that_is_missing_is_known(monkeypatch):
    kinds = {"here": caches.Kind("torch", "", 4), "not": caches.Kind("no_such.package", "", 4)}
    monkeypatch.setattr(caches, "KINDS", kinds)
    assert caches.installed("here")
    assert not caches.installed("not")


def test_a_quantile_is_chosen_on_windows_that_set_no_scale(monkeypatch):
    """The held windows alone are scored meanwhile."""
    model = planted("llama")
    rows = [
        torch.randint(3, 50, (1, 16), generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    data = Data(rows[:2], rows[2:3], rows[3:])
    scored: list[list[Tensor]] = []
    losses = quantisation.losses
    monkeypatch.setattr(
        quantisation,
        "losses",
        lambda model, rows, drop: scored.append(rows) or losses(model, rows, drop),
    )
    known = remedies.Known.of(model, data)
    _, chosen = quantisation.measure(model, known, "static, quantile", "as it is")
    assert [rows is data.held for rows in scored] == [True] * 4 + [False]
    assert scored[-1] is data.scored
    assert chosen in (1.0, 0.99999, 0.9999, 0.999)
