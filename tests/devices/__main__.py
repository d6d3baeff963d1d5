"""`python -m tests.devices`: every mode under DDP, FSDP2, tensor parallelism and over two devices;
`--write` puts the table into docs/parallel.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

import torch
from rich.console import Console

from tests.devices.table import OUTCOMES, markdown, table, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.devices", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into docs/parallel.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    found = table()
    Console(width=10_000, highlight=False, markup=False).print(markdown(found))
    outcomes = {outcome for cells in found.values() for outcome in cells.values()}
    if not outcomes <= OUTCOMES:
        return 1
    if options.write:
        write(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
