"""The benchmark of models larger than memory, on a small one: what it says of memory is true."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import biassurgery as bs
from biassurgery.data.loading import load_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import onload  # noqa: E402

# /proc/self/status, and a limit that counts mappings as Linux does.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it samples /proc")
BLOCKS = 24
WINDOWS = 3
LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("larger")
    total = onload.write(folder, onload.SMALL, BLOCKS)
    assert total == pytest.approx(sum(f.stat().st_size for f in folder.iterdir()), rel=1e-3)
    return folder


@pytest.fixture(scope="module")
def limited(folder: Path) -> Callable[[str], Any]:
    allowance = onload.WORK + onload.allowance_of(onload.SMALL, WINDOWS, LENGTH)
    # The checkpoint is several times as large as what may be allocated.
    weights = BLOCKS * onload.SMALL.block_bytes
    assert weights > 4 * allowance
    return lambda way: onload.measured(folder, WINDOWS, LENGTH, allowance, way)


@pytest.mark.long
def test_a_checkpoint_several_times_larger_than_the_limit(
    folder: Path, limited: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    done = limited("blocks")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    block = onload.SMALL.block_bytes
    table = onload.SMALL.table_bytes
    states = onload.allowance_of(onload.SMALL, WINDOWS, LENGTH) - 2 * block
    with capsys.disabled():
        onload.report(onload.SMALL, BLOCKS, BLOCKS * block + 2 * table, WINDOWS, LENGTH, found)
    assert block < found["anonymous"] <= 2 * block + table + states
    assert found["resident"] <= 2 * block + table + states + onload.WORK
    # The same as without a limit, to the last bit.
    model = load_model(str(folder), device="cpu").model
    batches = onload.batches_of(WINDOWS, LENGTH, 1000)
    sites = bs.calibrate(model, batches, min_magnitude=0.0, min_ratio=8.0, progress=False)
    assert len(sites)
    assert found["sites"] == [[s.layer, s.channel, s.role, s.mean, s.std, s.count] for s in sites]


@pytest.mark.long
def test_the_ordinary_way_does_not_fit(limited: Callable[[str], Any]) -> None:
    done = limited("whole")
    assert done.returncode
    assert "Cannot allocate memory" in done.stderr


def test_how_often_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `docs/scale.md` says of each verb."""
    onload.write(tmp_path, onload.SMALL, 3)
    with pytest.warns(UserWarning, match="less than 2x apart"):
        found = onload.readings(tmp_path, 2, LENGTH)
    assert {name: of["blocks"] for name, of in found.items()} == {
        "calibrate, nothing massive": 1,
        "calibrate": 2,
        "detect, nothing massive": 1,
        "detect": 2,
        "calibrate_key_values": 1,
        "diagnose": 2,
    }
    assert found["calibrate"]["ordinarily"] == 2 + 1
    onload.report_readings(2, found)
    assert "| diagnose | 2.00 |" in capsys.readouterr().out


def test_it_keeps_within_its_own_limit_only() -> None:
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
