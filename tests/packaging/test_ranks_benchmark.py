"""The benchmark of weak scaling on a tiny model: it runs, and two processes count as one does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ranks  # noqa: E402


@pytest.mark.long
def test_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS), prepend=":")  # of the processes
    options = ranks.arguments(["--quick"])
    found = ranks.measured(options)
    together, alone = found["counts"]
    assert together == alone
    assert set(together) == {ranks.WORLD * 4 * options.batches}  # each sequence's start token
    names = {ranks.ONE, ranks.AGAIN, ranks.APART, ranks.TOGETHER}
    assert set(found["times"]) == names
    assert all(len(times) == options.repeats for times in found["times"].values())
    table = ranks.report(found)
    assert table.row_count == len(ranks.ROWS)
