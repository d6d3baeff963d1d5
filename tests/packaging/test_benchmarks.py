"""The benchmark of vision transformers, on tiny ones: it runs, and every row is what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import vision  # noqa: E402
from ways import ready  # noqa: E402

SIZE = 224
CHANGES = {"fix_registers", "set_mean, one block", "set_mean, all blocks", "attention_bias kv"}
SAME = {"unpatched", "unpatched again", "without fast path", "instrument", "record sink_mass"}
ROWS = [
    (name, row)
    for name in vision.KINDS
    for row in vision.variants(name, "eager", list(vision.VARIANTS))
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 32, "DEPTH": 2, "HEADS": 2}.items():
        monkeypatch.setattr(vision, name, value)


def build(name: str) -> Any:
    torch.manual_seed(0)
    return vision.KINDS[name].build(SIZE).eval()


def output_of(model: Any, pixels: Tensor) -> Tensor:
    output = vision.forward(model, pixels)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def test_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numbers.json"
    run = ["vision.py", "--repeats", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", run)
    vision.main()
    results = json.loads(file.read_text())["results"]
    assert {name: list(cells) for name, cells in results.items()} == {
        "timm": ["224 px x 1", "224 px x 8", "518 px x 1", "518 px x 8"],
        "dinov2": ["224 px x 1", "224 px x 8"],
        "open_clip": ["224 px x 1", "224 px x 8"],
    }
    for name, cells in results.items():
        for rows in cells.values():
            assert list(rows) == [row for each, row in ROWS if each == name]
            assert all(number > 0 for row in rows.values() for number in row.values())
            assert rows["unpatched"]["ratio"] == 1
    shown = capsys.readouterr().out
    assert all(row in shown for row in CHANGES | SAME)
    monkeypatch.setattr(
        sys,
        "argv",
        [*run, "--models", "timm", "open_clip", "--sizes", "518", "--rows", "fix_registers"],
    )
    vision.main()
    results = json.loads(file.read_text())["results"]
    assert {
        name: {cell: list(rows) for cell, rows in cells.items()} for name, cells in results.items()
    } == {
        "timm": {
            cell: ["unpatched", "unpatched again", "fix_registers"]
            for cell in ("518 px x 1", "518 px x 8")
        }
    }


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_row_is_what_it_says(name: str, row: str) -> None:
    assert (row in CHANGES) != (row in SAME)
    model = build(name)
    pixels = vision.images(model, 2, SIZE)
    plain = output_of(model, pixels)
    variant = vision.VARIANTS[row]
    with ready(model, variant.patch, "eager") as patched:
        output = output_of(patched, pixels)
        found = variant.run(patched, pixels)
    if row in CHANGES:
        assert (output - plain).abs().max() > 5e-4
    else:
        torch.testing.assert_close(output, plain, rtol=0, atol=1e-5)
    if row == "record sink_mass":
        assert [tuple(found["sink_mass"][layer].shape[:2]) for layer in range(2)] == [
            (2, 2),
            (2, 2),
        ]
    assert torch.equal(output_of(model, pixels), plain)


def test_the_fast_path_is_part_of_the_unpatched_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    native = torch._native_multi_head_attention
    calls = []
    monkeypatch.setattr(
        torch,
        "_native_multi_head_attention",
        lambda *args, **kwargs: calls.append(1) or native(*args, **kwargs),
    )
    model = build("open_clip")
    pixels = vision.images(model, 1, SIZE)
    for row, expected in {
        "unpatched": 2,
        "set_mean, all blocks": 2,
        "without fast path": 0,
        "attention_bias kv": 0,
        "instrument": 0,
        "unpatched again": 2,
    }.items():
        calls.clear()
        with ready(model, vision.VARIANTS[row].patch, "eager") as patched:
            vision.forward(patched, pixels)
        assert len(calls) == expected, row
