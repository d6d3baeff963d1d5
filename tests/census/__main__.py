"""`python -m tests.census`: examine every causal-LM type of the installed transformers; `--write` also commits the outcome to its file."""

from __future__ import annotations

import argparse
import warnings

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.census import expected
from tests.census.examine import examine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.census", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the committed outcome of this major version")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    verdicts = {name: examine(name) for name in track(expected.TYPES, "examining", transient=True)}
    if write:
        expected.write(verdicts)
    table = Table("type", "outcome", "reason")
    for name, verdict in verdicts.items():
        if verdict.reason:
            table.add_row(name, "not served" if verdict.built else "not built", verdict.reason)
        elif verdict.attention:
            table.add_row(name, "attention not served", verdict.attention)
    not_built = sum(not v.built for v in verdicts.values())
    not_served = sum(v.built and v.reason is not None for v in verdicts.values())
    built, served, percent = expected.share(not_built, not_served)
    console = Console(width=140)
    console.print(table)
    console.print(f"transformers {transformers.__version__}: {len(verdicts)} types, {built} built, {served} served ({percent:.1f} %), "
                  f"{served - sum(v.attention is not None for v in verdicts.values())} of them with modes on attention")


if __name__ == "__main__":
    main()
