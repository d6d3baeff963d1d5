"""Adapters that do not stay, and packages of others that are really installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from biassurgery.adapters import registry
from biassurgery.adapters.registry import adapters

THIRD_PARTY = Path(__file__).parents[1] / "third_party"


@pytest.fixture
def _own_registry(monkeypatch) -> None:
    """Whatever a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_ADAPTERS", list(adapters()))


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Path:
    """A folder into which pip has installed the third-party packages, beside one whose entry point
    is broken.
    """
    source = tmp_path_factory.mktemp("source") / "strangers"
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
    """Run code in a fresh process that finds the packages in a folder beside all others."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
