"""`python -m tests.census`: examine every causal-LM type of the installed transformers; `--write`
also commits the outcome to its file.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.census", description=__doc__)
    parser.add_argument(
        "--timm",
        action="store_true",
        help="every transformer of the installed timm that has one list of blocks instead",
    )
    parser.add_argument(
        "--vision",
        action="store_true",
        help="every type of the installed transformers that reads images instead",
    )
    parser.add_argument(
        "--write", action="store_true", help="replace the committed outcome of this major version"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    of = of_timm if options.timm else of_vision if options.vision else of_transformers
    table, total = of(options.write)
    console = Console(width=140)
    console.print(table)
    console.print(total)


def of_transformers(write: bool) -> tuple[Table, str]:
    """What is not served, and the totals."""
    import transformers

    from tests.census import expected
    from tests.census.examine import examine
    from tests.census.situations import RIGHT, situations

    transformers.logging.set_verbosity_error()
    verdicts = {name: examine(name) for name in track(expected.TYPES, "examining", transient=True)}
    served_types = [name for name, v in verdicts.items() if v.built and v.reason is None]
    cells = {
        name: situations(name) for name in track(served_types, "in situations", transient=True)
    }
    if write:
        expected.write(verdicts, cells)
    table = Table("type", "outcome", "reason")
    for name, verdict in verdicts.items():
        if verdict.reason:
            table.add_row(name, "not served" if verdict.built else "not built", verdict.reason)
        elif verdict.attention:
            table.add_row(name, "attention not served", verdict.attention)
        for mode, cell in cells.get(name, {}).items():
            if cell not in (RIGHT, f"refused: {verdict.attention}"):
                table.add_row(name, mode, cell)
    not_built = sum(not v.built for v in verdicts.values())
    not_served = sum(v.built and v.reason is not None for v in verdicts.values())
    built, served, percent = expected.share(not_built, not_served)
    return (
        table,
        (
            f"transformers {transformers.__version__}: {len(verdicts)} types, {built} built,"
            f" {served} served ({percent:.1f} %),"
            f" {served - sum(v.attention is not None for v in verdicts.values())} of them with"
            " modes on attention; right with a mask, behind padding and with a cache:"
            + ",".join(f" {mode} {right(cells, mode)}" for mode in expected.MODES)
            + ", the rest refused"
        ),
    )


def right(cells: dict[str, dict[str, str]], mode: str) -> int:
    """For how many types a mode is right in all situations."""
    from tests.census.situations import RIGHT

    return sum(cell[mode] == RIGHT for cell in cells.values())


def of_timm(write: bool) -> tuple[Table, str]:
    """The same of timm."""
    import timm

    from tests.census.timm_examine import examine, refusal, refused, write_outcomes
    from tests.census.timm_models import classes, structures

    outcomes = {
        structure: examine(structure)
        for structure in track(structures(), "examining", transient=True)
    }
    if write:
        write_outcomes(outcomes)
    table = Table("architectures", "outcome", "reason")
    for names in refused().values():
        table.add_row(" ".join(names), "not served", refusal(names[0]))
    for structure, outcome in outcomes.items():
        if outcome.attention or outcome.gate:
            table.add_row(
                " ".join(structure.names),
                "attention not served" if outcome.attention else "gate not served",
                outcome.attention or outcome.gate,
            )
    served = sum(len(structure.names) for structure in outcomes)
    attention = sum(
        len(structure.names) for structure, outcome in outcomes.items() if outcome.attention is None
    )
    stacks = served + sum(map(len, refused().values()))
    return (
        table,
        (
            f"timm {timm.__version__}: {len(classes())} architectures, {stacks} of them"
            f" transformers with blocks on tokens, {served} served, in {len(outcomes)} structures,"
            f" {attention} of these with modes on attention"
        ),
    )


def of_vision(write: bool) -> tuple[Table, str]:
    """The same of types that read images."""
    import transformers

    from tests.census.vision_examine import CELLS, RIGHT, TYPES, examine, totals, written
    from tests.census.vision_examine import write as write_file

    transformers.logging.set_verbosity_error()
    outcomes = {name: examine(name) for name in track(TYPES, "examining", transient=True)}
    if write:
        write_file(outcomes)
    table = Table("type", "outcome", "reason")
    for name, outcome in outcomes.items():
        if outcome.refused:
            table.add_row(name, "refused" if outcome.built else "not built", outcome.refused)
        for cell in CELLS:
            said = (outcome.cells or {}).get(cell, RIGHT)
            if said != RIGHT:
                table.add_row(name, cell, said)
    types, built, served, by_name, *right = totals(written(outcomes))
    counts = ", ".join(f"{cell} {count}" for cell, count in zip(CELLS, right))
    return (
        table,
        (
            f"transformers {transformers.__version__}: {types} types that read images, {built}"
            f" built, {served} served, {by_name} of them as a tower that is named; right: {counts},"
            " the rest refused"
        ),
    )


if __name__ == "__main__":
    main()
