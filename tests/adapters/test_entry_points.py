"""A package that makes its model known by an entry point, as pip installs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

THIRD_PARTY = Path(__file__).parents[1] / "third_party"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the third-party package, beside one whose entry point
    is broken.
    """
    source = tmp_path_factory.mktemp("source") / "oddformer"
    target = tmp_path_factory.mktemp("site")
    shutil.copytree(THIRD_PARTY, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
    ]
    done = subprocess.run(
        [*pip, "--target", str(target), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    broken = target / "broken-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text(
        "[biassurgery.adapters]\nbroken = nowhere_to_be_found:Adapter\n"
    )
    return target


def run_with(folder: Path, code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


def test_a_package_makes_its_model_known_by_an_entry_point(installed):
    done = run_with(
        installed,
        """
import warnings
import torch
import biassurgery as bs
from oddformer import CHANNEL, Oddformer

model, words = Oddformer().eval(), torch.tensor([[0, 4, 5, 6], [0, 7, 8, 9]])
with torch.no_grad():
    before = model(words)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    sites = bs.calibrate(model, words)
messages = [str(w.message) for w in told]
assert any("broken" in m and "nowhere_to_be_found" in m for m in messages), messages
assert sites.origin.architecture == "oddformer"
found = {(site.layer, site.channel, site.role) for site in sites}
assert found == {(layer, CHANNEL, "start") for layer in range(3)}
with bs.patched(model, "set_zero", sites=sites), torch.no_grad():
    assert (model(words) - before).abs().max() > 1
with torch.no_grad():
    assert torch.equal(model(words), before)
""",
    )
    assert done.returncode == 0, done.stderr
