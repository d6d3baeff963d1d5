"""kill -9 at any point of a pass: from its checkpoint it goes on to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.measure.killing import BATCHES, FAULTS, PASSES

ROOT = Path(__file__).parents[2]
# Without a fork there is no SIGKILL either.
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL is of POSIX systems")


def killed(folder: Path, how: str, *names: str) -> dict[str, Any]:
    """The report of `tests.measure.killing`."""
    command = [sys.executable, "-m", "tests.measure.killing", str(folder), how, *names]
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return killed(tmp_path_factory.mktemp("killed"), "in turn", *PASSES)


@pytest.mark.long
@pytest.mark.parametrize("name", PASSES)
def test_killed_at_every_batch_and_on_both_sides_of_the_rename(
    in_turn: dict[str, Any], name: str
) -> None:
    """One pass that dies in a forward, with a file written but not renamed, and behind the rename,
    of each batch in turn, and is started again after each death.
    """
    found = in_turn[name]
    batches = 4 if name == "top1_accuracy" else BATCHES
    assert found["deaths"] >= len(FAULTS) * batches
    assert set(found["results"]) == {found["whole"]}
    assert found["files"] == ["pass.checkpoint"]  # nothing half-written is left


@pytest.mark.long
def test_the_passes_differ(in_turn: dict[str, Any]) -> None:
    """The comparison can fail: each result has many digits, and noise changes them."""
    whole = {name: found["whole"] for name, found in in_turn.items()}
    assert whole.pop("calibrate by blocks") == whole["calibrate"]
    assert whole.pop("key values by blocks") == whole["calibrate_key_values"]
    assert whole.pop("detect by blocks") != whole["detect"]  # which counts the squares as well
    results = list(whole.values())
    assert len(set(results)) == len(results)
    assert "nan" not in "".join(results[-3:])


@pytest.mark.long
@pytest.mark.parametrize("name", PASSES)
def test_killed_from_outside_at_random_times(tmp_path: Path, name: str) -> None:
    found = killed(tmp_path, "60", name)[name]
    assert found["deaths"] >= 60
    assert set(found["results"]) == {found["whole"]}
