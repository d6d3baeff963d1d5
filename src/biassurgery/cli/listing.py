"""The tables of `biassurgery list`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biassurgery.findings.render import table

if TYPE_CHECKING:
    from rich.console import Group


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
