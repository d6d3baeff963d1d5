"""The benchmark for GPUs, on a CPU: so that it cannot rot where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from gpu_rows import Row, Skipped, Stage
from timing import verdict


@pytest.mark.long
def test_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    written = ["--json", str(file), "--markdown", str(table)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", *written])
    assert gpu.main() == 0
    found = json.loads(file.read_text())
    rows = found["rows"]
    assert found["setting"]["small"]
    assert not [row for row in rows if row["verdict"] == "failed"]
    passed = {row["name"] for row in rows if row["verdict"] == "passed"}
    for mode in ("instrument", "set_mean", "attention_bias kv", "transplant"):
        for way in ("eager", "decoded", "undone"):
            assert {f"{mode}, bfloat16: {way}", f"{mode}, float16: {way}"} <= passed
    assert "attention_bias kv, bfloat16" in passed  # compiled
    measured = [row["section"] for row in rows if row["verdict"] == "measured"]
    assert {"prefill", "decode", "calibrate", "training step"} <= set(measured)
    assert len(table.read_text().splitlines()) == len(rows) + 4
    assert f"{len(rows)} rows, 0 failed" in capsys.readouterr().out


def test_what_does_not_fit_is_skipped_and_what_raises_is_a_row() -> None:
    right = Row("part", "one", "passed", "fine")

    def raising() -> list[Row]:
        raise ValueError("no such thing\nand more")

    def unable() -> list[Row]:
        raise Skipped("needs a GPU")

    stages = [
        Stage("part", "one", 1, lambda: [right, right]),
        Stage("part", "two", 1, raising),
        Stage("part", "three", 1000, lambda: [right]),
        Stage("part", "four", 1, unable),
    ]
    rows = list(gpu.rows_of(stages, seconds=100))
    assert [(row.name, row.verdict) for row in rows] == [
        ("one", "passed"),
        ("one", "passed"),
        ("two", "failed"),
        ("three", "skipped"),
        ("four", "skipped"),
    ]
    assert rows[2].said == "ValueError: no such thing"
    assert rows[3].said.startswith("it may take 1000 s, and ")
    assert rows[4].said == "needs a GPU"


def test_a_failed_row_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [Row("part", "one", "failed", "off by 1")]
    stage = Stage("part", "one", 1, lambda: failed)
    monkeypatch.setattr(gpu, "stages_of", lambda device, small: iter([stage]))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small"])
    assert gpu.main() == 1


@pytest.mark.parametrize(
    ("ratio", "again", "spread", "said"),
    [
        (1.04, 1.0, 0.01, "passed"),
        (1.06, 1.0, 0.01, "failed"),
        (1.06, 1.02, 0.01, "passed"),  # against the model measured again
        (1.00, 1.03, 0.01, "inconclusive"),
        (1.00, 0.97, 0.01, "inconclusive"),
        (1.00, 1.0, 0.11, "inconclusive"),  # 0.11 / sqrt(16) is over half of 0.05
    ],
)
def test_verdicts(ratio: float, again: float, spread: float, said: str) -> None:
    measured = {"ratio": again, "low": again - spread / 2, "high": again + spread / 2}
    assert verdict({"ratio": ratio}, measured | {"repeats": 16}, 0.05) == said
