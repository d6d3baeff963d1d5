"""`supported`: what the contract battery (tests/contract) has really run and passed.

It is read from a file that the battery writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby, product
from typing import TYPE_CHECKING, Any, NamedTuple

from biassurgery.findings.render import Printable, table

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

FILE = "support.json"


class Run(NamedTuple):
    """One version of a library, and the checks that passed under it; None: it was not run."""

    version: str
    checks: tuple[str, ...] | None


@dataclass(frozen=True)
class Support:
    """One architecture with one mode.

    Attributes:
        family: the architecture.
        mode: the mode's name.
        runs: what passed under each version of the model's library with which the battery was run
            at all.
    """

    family: str
    mode: str
    runs: tuple[Run, ...]

    @property
    def checks(self) -> tuple[str, ...]:
        """What a model was put through with the patch on, and passed under each of `versions`."""
        first, *others = [run.checks for run in self.runs if run.checks is not None]
        return tuple(check for check in first if all(check in checks for checks in others))

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions of the model's library under which it ran."""
        return tuple(run.version for run in self.runs if run.checks is not None)

    @property
    def not_run(self) -> tuple[str, ...]:
        """The versions under which other architectures or modes ran, but not this one."""
        return tuple(run.version for run in self.runs if run.checks is None)


class SupportMatrix(Printable, tuple[Support, ...]):
    """All `Support` entries; `print` it for a table, `to_pandas` for a frame.

    The table has architectures by versions.
    """

    __slots__ = ()

    def to_pandas(self) -> pandas.DataFrame:
        """One row an architecture and mode: family, mode, checks, versions, not_run.

        `checks` is the number of those that passed under all versions.
        """
        import pandas

        columns = ["family", "mode", "checks", "versions", "not_run"]
        rows = [
            (s.family, s.mode, len(s.checks), ", ".join(s.versions), ", ".join(s.not_run))
            for s in self
        ]
        return pandas.DataFrame(rows, columns=pandas.Index(columns))

    def __rich__(self) -> Table:
        """One row an architecture: how many checks passed with each mode.

        Versions with equal outcomes stand together.
        """
        columns = ("architecture", "with", "checks and modes")
        lines = table("Checks passed, by architecture and mode", *columns, left=columns)
        for family, entries in groupby(self, key=lambda entry: entry.family):
            for versions, outcome in _outcomes(list(entries)):
                lines.add_row(family, versions, outcome)
        return lines


def _outcomes(entries: list[Support]) -> Iterator[tuple[str, str]]:
    """The versions of one architecture with the same outcome, and the outcome in words."""
    by_version: dict[str, dict[str, int | None]] = {}
    for entry in entries:
        for run in entry.runs:
            passed = None if run.checks is None else len(run.checks)
            by_version.setdefault(run.version, {})[entry.mode] = passed
    for outcome, versions in groupby(by_version, key=lambda v: _in_words(by_version[v])):
        first, *others = versions
        yield ", ".join([first, *(version.split()[1] for version in others)]), outcome


def _in_words(passed: dict[str, int | None]) -> str:
    """{"set_mean": 29, "set_zero": 30, "noise": 29} is "30 set_zero; 29 set_mean, noise"."""
    modes: dict[int | None, list[str]] = {}
    for mode, count in passed.items():
        modes.setdefault(count, []).append(mode)
    absent = modes.pop(None, [])
    counts = sorted((count for count in modes if count is not None), reverse=True)
    words = [f"{count} {', '.join(modes[count])}" for count in counts]
    if absent:
        words.append(f"not run: {', '.join(absent)}" if words else "not run")
    return "; ".join(words)


def supported() -> SupportMatrix:
    """The matrix architecture x mode that the contract battery has run.

    Each entry has the checks that passed under each version of the architecture's library. Other
    models may work as well: the structural fallback serves any causal language model of
    transformers with one list of blocks.
    """
    return matrix(read_rows())


def read_rows() -> list[dict[str, Any]]:
    """What is recorded, one row for each version of each library.

    A row has `library`, `version`, and `passed`: groups of `families` with the same `modes`,
    {mode: checks}.
    """
    return json.loads((files("biassurgery") / "assets" / FILE).read_text(encoding="utf-8"))


def matrix(rows: Iterable[dict[str, Any]]) -> SupportMatrix:
    """One entry an architecture and mode, in which every version of its library stands."""
    passed: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {}
    libraries: dict[str, str] = {}  # of each family
    versions: dict[str, list[str]] = {}  # of each library
    for row in rows:
        version = f"{row['library']} {row['version']}"
        versions.setdefault(row["library"], []).append(version)
        for group in row["passed"]:
            for family, (mode, checks) in product(group["families"], group["modes"].items()):
                libraries[family] = row["library"]
                passed.setdefault((family, mode), {})[version] = tuple(checks)
    families = list(libraries)  # a mode that only a later version ran stands with its family
    by_family = sorted(passed.items(), key=lambda item: families.index(item[0][0]))
    return SupportMatrix(
        Support(
            family,
            mode,
            tuple(Run(version, runs.get(version)) for version in versions[libraries[family]]),
        )
        for (family, mode), runs in by_family
    )
