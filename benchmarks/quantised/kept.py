"""The cells of the table, in a file that is written whenever there is a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Cells:
    """The loss of every window, in nats a token, by row, column and seed.

    Args:
        file: may be there already, of an earlier run.
        about: what all cells of the file have in common.
    """

    def __init__(self, file: Path, about: dict[str, Any]) -> None:
        self.file = file
        self.kept: dict[str, Any] = {"about": about, "cells": {}, "quantiles": {}}
        if file.is_file():
            self.kept |= json.loads(file.read_text())
            if self.kept["about"] != about:
                raise SystemExit(f"{file} is of {self.kept['about']}; give another --keep")

    def has(self, row: str, column: str, seed: int) -> bool:
        return f"{row} | {column} | {seed}" in self.kept["cells"]

    def add(
        self, row: str, column: str, seed: int, losses: list[float], quantile: float | None
    ) -> None:
        """A cell, and the quantile of the calibration magnitudes that its scales reach to."""
        name = f"{row} | {column} | {seed}"
        self.kept["cells"][name] = losses
        if quantile is not None:
            self.kept["quantiles"][name] = quantile
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.kept))
        part.replace(self.file)

    def of(self, row: str, column: str) -> list[list[float]]:
        """The losses of the windows, a list a seed."""
        start = f"{row} | {column} | "
        return [losses for name, losses in self.kept["cells"].items() if name.startswith(start)]
