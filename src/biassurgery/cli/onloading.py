"""The options of commands that read a model larger than memory."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Order(str, Enum):
    """In which order the blocks and the data meet."""

    blocks = "blocks"


OnloadOption = Annotated[
    Order | None,
    typer.Option(
        "--onload",
        help=(
            "blocks: all data through one block before the next is read from disk, for a "
            "checkpoint larger than memory. Default: load the whole model."
        ),
    ),
]
Spill = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="With --onload: where the hidden states between blocks go. Default: memory.",
    ),
]


@dataclass(frozen=True)
class Onloading:
    """How a model larger than memory is read."""

    onload: OnloadOption = None
    spill: Spill = None

    @property
    def options(self) -> dict[str, Any]:
        """What loading and the verbs are given."""
        return {"onload": None if self.onload is None else self.onload.value, "spill": self.spill}
