"""The benchmark of how costs grow, on tiny models: every part runs, and its lines are lines."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import growth  # noqa: E402


def run(monkeypatch: pytest.MonkeyPatch, file: Path, *varied: str) -> dict[str, Any]:
    """What `--quick` writes down."""
    command = ["growth.py", "--quick", "--json", str(file), "--varied", *varied]
    monkeypatch.setattr(sys, "argv", command)
    growth.main()
    return json.loads(file.read_text())


def test_tokens_blocks_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    varied = ("tokens", "blocks", "batches")
    results = run(monkeypatch, tmp_path / "numbers.json", *varied)
    assert list(results) == list(varied)
    for name in varied:
        assert list(results[name]) == [str(size) for size in getattr(growth.QUICK, name)]
        for ways in results[name].values():
            assert list(ways) == list(growth.WAYS)
            assert all(way["seconds"] > 0 for way in ways.values())
    shown = capsys.readouterr().out
    assert shown.count("slope") == len(varied)
    assert all(shown.count(way) >= len(varied) for way in growth.WAYS)


@pytest.mark.long
def test_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=":")  # of the processes
    results = run(monkeypatch, tmp_path / "numbers.json", "processes")
    assert list(results["processes"]) == [str(count) for count in growth.QUICK.processes]
    for ways in results["processes"].values():
        assert list(ways) == ["forward", "calibrate, apart", "calibrate"]
        assert all(way["seconds"] > 0 for way in ways.values())
    assert "slope" in capsys.readouterr().out


def test_a_line_is_one() -> None:
    sizes = (1, 2, 4, 8)
    straight = growth.line(sizes, [3.0 + 2.0 * size for size in sizes])
    assert straight.slope == pytest.approx(2.0)
    assert straight.off == pytest.approx(0.0, abs=1e-9)
    bent = growth.line(sizes, [float(size**2) for size in sizes])
    assert bent.off > 0.2


def test_sizes_go_as_far_as_documented() -> None:
    full = growth.FULL
    assert (full.tokens[0], full.tokens[-1]) == (512, 8192)
    assert (full.blocks[0], full.blocks[-1]) == (4, 64)
    assert (full.batches[0], full.batches[-1]) == (10, 10_000)
    assert full.processes == (1, 2)


@pytest.mark.skipif(not growth.CLEAR_PEAK.exists(), reason="the peak is read from /proc")
def test_the_peak_is_of_that_run_alone() -> None:
    size = 40_000_000
    assert growth.peak(lambda: bytearray(b"1" * size)) >= 0.9 * size / growth.MB
    assert math.isclose(growth.peak(lambda: None), 0.0, abs_tol=5.0)
