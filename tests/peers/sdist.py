"""The tests of an installed library, from the source distribution of the same version."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path.home() / ".cache" / "biassurgery" / "peers"
# what the tests import and the library does not bring
NEEDED = {"transformers": ("parameterized",), "timm": (), "open_clip_torch": ()}


class Absent(Exception):
    """The source distribution cannot be had."""


def tests_of(library: str) -> Path:
    """The folder of a library's tests, downloaded once.

    Raises:
        Absent: the package index does not have it, or cannot be reached.
    """
    release = version(library)
    folder = CACHE / f"{library}-{release}"
    tests = folder / f"{library}-{release}" / "tests"
    if tests.is_dir():
        return tests
    folder.mkdir(parents=True, exist_ok=True)
    options = ("--no-deps", "--no-binary", library, "--dest", str(folder))
    _pip("download", *options, f"{library}=={release}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        members = [m for m in packed.getmembers() if "/tests/" in f"{m.name}/"]
        packed.extractall(folder, members, filter="data")
    return tests


def needed_by(library: str) -> Path:
    """A folder with what the tests of a library import."""
    folder = CACHE / "site-packages"
    for name in NEEDED[library]:
        if not (folder / name).is_dir():
            _pip("install", "--no-deps", "--target", str(folder), name)
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments[:1], "--quiet", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Absent(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
