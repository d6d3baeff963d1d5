"""What the battery consists of, and the file in which a run of it is recorded for
`biassurgery.supported()`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from biassurgery import support
from tests.contract.cases import CASES

FILE = Path(__file__).parents[2] / "src" / "biassurgery" / "assets" / support.FILE

Check = tuple[str, str, str]  # family, mode, check


def battery() -> set[Check]:
    """Every check that the battery runs, read off its test functions."""
    checks: set[Check] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for name, function in vars(importlib.import_module(f"{__package__}.{path.stem}")).items():
            for mark in getattr(function, "pytestmark", []):
                if (
                    name.startswith("test_")
                    and mark.name == "parametrize"
                    and mark.args[0] == "case"
                ):
                    checks |= {(case.family, case.variant, check_of(name)) for case in mark.args[1]}
    return checks


def check_of(function: str) -> str:
    """The name of a check, from that of its test function."""
    return function.removeprefix("test_").replace("_", " ")


def listed(runs: list[dict[str, Any]]) -> set[Check]:
    """Every check in recorded runs."""
    return {
        (family, mode, check)
        for run in runs
        for group in run["passed"]
        for family in group["families"]
        for mode, checks in group["modes"].items()
        for check in checks
    }


def write(passed: Collection[Check]) -> None:
    """Record a run under this environment's versions, in place of an earlier one with the same
    version of transformers.
    """
    versions = {
        name: version(name) for name in ("transformers", "timm", "open_clip_torch", "torch")
    }
    groups: list[dict[str, Any]] = []
    for family, library in {case.family: case.library for case in CASES}.items():
        modes = {
            case.variant: sorted(
                check for f, mode, check in passed if (f, mode) == (family, case.variant)
            )
            for case in CASES
            if case.family == family
        }
        same = next(
            (group for group in groups if (group["library"], group["modes"]) == (library, modes)),
            None,
        )
        if same is None:
            groups.append({"library": library, "families": [family], "modes": modes})
        else:
            same["families"].append(family)
    runs = [
        run
        for run in support.read_runs()
        if run["versions"]["transformers"] != versions["transformers"]
    ]
    runs.append({"versions": versions, "passed": groups})
    runs.sort(
        key=lambda run: [int(part) for part in run["versions"]["transformers"].split(".")[:2]]
    )
    FILE.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
