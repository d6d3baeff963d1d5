"""What the battery consists of, and the file in which a run of it is recorded.

`biassurgery.supported()` reads that.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

from biassurgery import support
from tests.contract.cases import CASES, Case

FILE = Path(__file__).parents[2] / "src" / "biassurgery" / "assets" / support.FILE
LIBRARIES = {case.family: case.library for case in CASES}

Check = tuple[str, str, str]  # family, mode, check
Row = dict[str, Any]


def battery() -> set[Check]:
    """Every check of the battery, read off its test functions.

    Also those of families that the installed libraries do not have.
    """
    checks: set[Check] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for name, function in vars(importlib.import_module(f"{__package__}.{path.stem}")).items():
            if name.startswith("test_"):
                cases = _cases_of(function)
                checks |= {(case.family, case.variant, check_of(name)) for case in cases}
    return checks


def _cases_of(function: Any) -> list[Case]:
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    given = [case for mark in marks if mark.args[0] == "case" for case in mark.args[1]]
    return [parameter.values[0] for parameter in given]


def check_of(function: str) -> str:
    """The name of a check, from that of its test function."""
    return function.removeprefix("test_").replace("_", " ")


def listed(rows: Iterable[Row]) -> set[Check]:
    """Every check in recorded rows."""
    return {
        (family, mode, check)
        for row in rows
        for group in row["passed"]
        for family in group["families"]
        for mode, checks in group["modes"].items()
        for check in checks
    }


def row_of(library: str, rows: Iterable[Row]) -> Row | None:
    """The row of the installed version of a library, if there is one."""
    installed = (library, version(library))
    return next((row for row in rows if (row["library"], row["version"]) == installed), None)


def write(passed: Collection[Check], failed: Collection[Check]) -> None:
    """Record a run in the rows of the installed versions.

    What was not run stays as it was, in these rows as in those of other versions, so that a part of
    the battery and a single environment are enough to add to the file.
    """
    rows = support.read_rows()
    all_checks = battery()
    for library in dict.fromkeys(LIBRARIES.values()):
        before = row_of(library, rows)
        checks = listed([before] if before else []) - set(failed) | set(passed)
        checks = {check for check in checks & all_checks if LIBRARIES[check[0]] == library}
        rows = [row for row in rows if row is not before]
        if checks:
            row = {"library": library, "version": version(library), "passed": _grouped(checks)}
            rows.append(row)
    order = list(dict.fromkeys(LIBRARIES.values()))
    rows.sort(key=lambda row: (order.index(row["library"]), Version(row["version"])))
    FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _grouped(checks: Collection[Check]) -> list[dict[str, Any]]:
    """Families that passed the same checks with the same modes, in the order of the battery."""
    groups: list[dict[str, Any]] = []
    for family in LIBRARIES:
        variants = [case.variant for case in CASES if case.family == family]
        by_mode = {
            mode: sorted(check for f, m, check in checks if (f, m) == (family, mode))
            for mode in variants
        }
        modes = {mode: names for mode, names in by_mode.items() if names}
        same = next((group for group in groups if group["modes"] == modes), None)
        if same is not None:
            same["families"].append(family)
        elif modes:
            groups.append({"families": [family], "modes": modes})
    return groups
