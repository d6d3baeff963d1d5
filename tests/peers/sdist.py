"""The tests of an installed library, from the source distribution of the same version."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from tests.peers.libraries import Library

CACHE = Path.home() / ".cache" / "biassurgery" / "peers"


class Absent(Exception):
    """The source distribution cannot be had."""


def tests_of(library: Library) -> Path:
    """The folder of a library's tests, downloaded once.

    Raises:
        Absent: the package index does not have it, or cannot be reached.
    """
    name = library.distribution
    release = version(name)
    folder = CACHE / f"{name}-{release}"
    tests = folder / f"{name}-{release}" / "tests"
    if tests.is_dir():
        return tests
    folder.mkdir(parents=True, exist_ok=True)
    options = ("--no-deps", "--no-binary", name, "--dest", str(folder))
    _pip("download", *options, f"{name}=={release}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        members = [m for m in packed.getmembers() if "/tests/" in f"{m.name}/"]
        packed.extractall(folder, members, filter="data")
    return tests


def needed_by(library: Library) -> Path:
    """A folder with what the tests of a library import."""
    folder = CACHE / "site-packages"
    for name in library.needs:
        if not (folder / name).is_dir():
            _pip("install", "--no-deps", "--target", str(folder), name)
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments[:1], "--quiet", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Absent(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
