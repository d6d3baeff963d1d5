"""One run of a library's tests in a process of its own, with one patch on all models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.peers.libraries import LIBRARIES
from tests.peers.sdist import needed_by, tests_of

INSIDE = Path(__file__).parent / "inside"
SOURCE = Path(__file__).parents[2] / "src"


@dataclass(frozen=True)
class Outcome:
    """What became of one test: passed, skipped or failed; the error; whether it patched a model."""

    outcome: str
    why: str
    patched: bool


def run(library: str, family: str, variant: str, select: str = "") -> dict[str, Outcome]:
    """What became of each test, by name.

    Raises:
        Absent: the library's tests cannot be had.
        RuntimeError: the tests did not run to their end.
    """
    kind = LIBRARIES[library]
    files, chosen = kind.families[family]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        package = place / "peer"
        _build(library, package)
        results = place / "results.json"
        paths = (SOURCE, place, needed_by(kind))
        environment = os.environ | {
            "PEERS_FAMILY": family,
            "PEERS_VARIANT": variant,
            "PEERS_RESULTS": str(results),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "peer.plugin"]
        command += ["-p", "no:cacheprovider", "--disable-warnings", "--tb=short"]
        command += ["-k", " and ".join(f"({one})" for one in (chosen, select) if one)]
        command += ["--rootdir", folder, *(str(package / name) for name in files)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
        found = json.loads(results.read_text())
        return {name: Outcome(**outcome) for name, outcome in found.items()}


def _build(library: str, package: Path) -> None:
    """The unpacked tests, and ours beside them."""
    kind = LIBRARIES[library]
    shutil.copytree(tests_of(kind), package)
    for source in (INSIDE / "plugin.py", *(INSIDE / library).glob("[!_]*.py")):
        target = package / kind.place.get(source.name, source.name)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(source, target)
        if kind.package:
            (target.parent / "__init__.py").touch()
