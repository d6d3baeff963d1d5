"""Images on disk: a folder of shades, and tables of their labels."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from PIL import Image


def paint(file: Path, shade: int, mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (40, 30), shade)
    image.paste(255 - shade, (0, 0, 20, 10))
    image.convert(mode).save(file)


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
