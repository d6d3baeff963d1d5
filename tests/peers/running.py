"""One run of a library's tests in a process of its own, with one patch on all models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.peers.sdist import needed_by, tests_of

INSIDE = Path(__file__).parent / "inside"
SOURCE = Path(__file__).parents[2] / "src"
VARIANTS = ("instrument", "zero_effect", "out_of_reach")
Outcomes = dict[str, tuple[str, str]]


def run(family: str, variant: str, select: str = "") -> Outcomes:
    """What became of each test: its outcome, and the error of one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        package = place / "peer"
        _build(package)
        results = place / "results.json"
        environment = os.environ | {
            "PEERS_FAMILY": family,
            "PEERS_VARIANT": variant,
            "PEERS_RESULTS": str(results),
            "PYTHONPATH": os.pathsep.join(
                [str(SOURCE), str(place), str(needed_by("transformers"))]
            ),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "peer.plugin"]
        command += ["-p", "no:cacheprovider", "--disable-warnings", "--tb=short", "-k", select]
        command += ["--rootdir", folder, str(package / "test_families.py")]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if not results.exists():
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
        return {name: tuple(outcome) for name, outcome in json.loads(results.read_text()).items()}


def _build(package: Path) -> None:
    """A package of the unpacked tests and of ours beside them."""
    shutil.copytree(tests_of("transformers"), package)
    for name in ("", "generation", "exporters"):
        (package / name).mkdir(exist_ok=True)
        (package / name / "__init__.py").touch()
    for name in ("testers", "plugin"):
        shutil.copy(INSIDE / f"{name}.py", package)
    shutil.copy(INSIDE / "families.py", package / "test_families.py")
    shutil.copy(INSIDE / "generation.py", package / "generation" / "test_utils.py")
    shutil.copy(INSIDE / "exports.py", package / "exporters" / "test_export.py")
