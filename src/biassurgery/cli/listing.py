"""`biassurgery list`: what this library knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biassurgery.cli import options as o
from biassurgery.cli.output import show
from biassurgery.findings.render import table

if TYPE_CHECKING:
    from rich.console import Group


def list_known(json: o.Json = False) -> None:
    """List architectures, modes, and checkpoints with published sites."""
    from biassurgery.adapters.registry import adapters
    from biassurgery.findings.published import published_runs
    from biassurgery.modes import MODES

    families = {adapter.family: adapter.modality for adapter in reversed(adapters())}
    modes = {name: (mode.__doc__ or "").split("\n\n")[0] for name, mode in MODES.items()}
    published = {
        run.checkpoint: f"layers {run.layers[0]} to {run.layers[-1]}" if run.layers else "none"
        for run in published_runs()
        if run.bos == run.bos_by_default
    }
    show(
        json,
        {"families": families, "modes": modes, "published": published},
        listing_tables(families, modes, published),
    )


def listing_tables(
    families: dict[str, str], modes: dict[str, str], published: dict[str, str]
) -> Group:
    """What this library knows: architectures, modes, and checkpoints with published sites.

    With each what it reads, what it does, or what is published of it.
    """
    from rich.console import Group

    tables = [
        ("Supported architectures", "family", "reads", families),
        ("Modes", "mode", "effect", modes),
        ("Checkpoints with published sites", "checkpoint", "massive activations", published),
    ]
    rendered = []
    for title, name, meaning, rows in tables:
        lines = table(title, name, meaning, left=(name, meaning))
        for row in rows.items():
            lines.add_row(*row)
        rendered.append(lines)
    return Group(*rendered)
