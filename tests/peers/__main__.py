"""`python -m tests.peers`: the libraries' own model tests on patched models.

They run once unpatched and once under each variant; what passes unpatched must pass patched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import version

from tests.peers import report
from tests.peers.libraries import LIBRARIES, VARIANTS
from tests.peers.running import run


def chosen(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The libraries and families that are asked for."""
    for library in arguments.library or LIBRARIES:
        for family in LIBRARIES[library].families:
            if not arguments.family or family in arguments.family:
                yield library, family


def compared(library: str, family: str, variants: list[str], select: str) -> report.Family:
    """One family, unpatched and under each variant."""
    plain = run(library, family, "unpatched", select)
    counts = {
        variant: report.compare(plain, run(library, family, variant, select))
        for variant in variants
    }
    return report.Family(library, version(LIBRARIES[library].distribution), family, counts)


def main() -> int:
    families = sorted({family for library in LIBRARIES.values() for family in library.families})
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("--library", action="append", choices=LIBRARIES, help="default: all")
    parser.add_argument("--family", action="append", choices=families, help="default: all")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="default: all")
    parser.add_argument("-k", dest="select", default="", help="as pytest's")
    parser.add_argument("--write", action="store_true", help=f"into {report.DOCUMENT.name}")
    arguments = parser.parse_args()
    if arguments.write and (arguments.variant or arguments.select):
        parser.error("--write takes whole families: leave out --variant and -k")
    unexplained = False
    for library, family in chosen(arguments):
        found = compared(library, family, arguments.variant or list(VARIANTS), arguments.select)
        sys.stdout.write(found.text())
        sys.stdout.flush()
        unexplained |= found.unexplained
        if arguments.write:
            report.write(found)
    return int(unexplained)


if __name__ == "__main__":
    sys.exit(main())
