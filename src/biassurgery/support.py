"""`supported`: what the contract battery (tests/contract) has really run and passed, read from a
file that the battery writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Any

from biassurgery.findings.render import Printable, table

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

FILE = "support.json"


@dataclass(frozen=True)
class Support:
    """One architecture with one mode.

    Attributes:
        family: the architecture.
        mode: the mode's name.
        checks: what a model was put through with the patch on, and passed under each of `versions`.
        versions: the versions of the model's library under which it ran.
    """

    family: str
    mode: str
    checks: tuple[str, ...]
    versions: tuple[str, ...]


class SupportMatrix(Printable, tuple[Support, ...]):
    """All `Support` entries. `print` it for a table of architectures by modes, `to_pandas` for a
    frame.
    """

    __slots__ = ()

    def to_pandas(self) -> pandas.DataFrame:
        """One row an architecture and mode: family, mode, checks (their number), versions."""
        import pandas

        rows = [(s.family, s.mode, len(s.checks), ", ".join(s.versions)) for s in self]
        return pandas.DataFrame(
            rows, columns=pandas.Index(["family", "mode", "checks", "versions"])
        )

    def __rich__(self) -> Table:
        """One row an architecture, one column a mode: how many checks passed."""
        entries = {(entry.family, entry.mode): entry for entry in self}
        modes = list(dict.fromkeys(entry.mode for entry in self))
        lines = table(
            "Checks passed, by architecture and mode",
            "architecture",
            *modes,
            "with",
            left=("architecture", "with"),
        )
        for family in dict.fromkeys(entry.family for entry in self):
            row = [entries.get((family, mode)) for mode in modes]
            versions = sorted({version for entry in row if entry for version in entry.versions})
            library = versions[0].split()[0]
            lines.add_row(
                family,
                *(str(len(entry.checks)) if entry else "" for entry in row),
                f"{library} {', '.join(version.split()[1] for version in versions)}",
            )
        return lines


def supported() -> SupportMatrix:
    """The matrix architecture x mode that the contract battery has run, with the checks that
    passed.

    Other models may work as well: the structural fallback serves any causal language model of
        transformers with one list of blocks.
    """
    return matrix(read_runs())


def read_runs() -> list[dict[str, Any]]:
    """The recorded runs of the battery, one for each environment.

    Each has `versions`, {library: version}, and `passed`, groups of `families` of one `library`
    with the same `modes`, {mode: checks}.
    """
    return json.loads((files("biassurgery") / "assets" / FILE).read_text(encoding="utf-8"))


def matrix(runs: Iterable[dict[str, Any]]) -> SupportMatrix:
    """One entry an architecture and mode: the checks that passed in every run in which it took
    part.
    """
    found: dict[tuple[str, str], Support] = {}
    for run in runs:
        for group in run["passed"]:
            version = f"{group['library']} {run['versions'][group['library']]}"
            for family, (mode, checks) in product(group["families"], group["modes"].items()):
                before = found.get((family, mode), Support(family, mode, tuple(checks), ()))
                common = tuple(check for check in before.checks if check in checks)
                found[family, mode] = Support(
                    family, mode, common, tuple(dict.fromkeys((*before.versions, version)))
                )
    return SupportMatrix(found.values())
