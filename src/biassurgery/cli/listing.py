"""The tables of `biassurgery list`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from biassurgery.findings.render import table

if TYPE_CHECKING:
    from rich.console import Group


def listing_tables(
    families: dict[str, str], modes: dict[str, str], published: dict[str, str]
) -> Group:
    """What this library knows: architectures and what they read, modes and what they do,
    checkpoints and what is published of them.
    """
    from rich.console import Group

    tables = [
        ("Supported architectures", "family", "reads", families),
        ("Modes", "mode", "effect", modes),
        ("Checkpoints with published sites", "checkpoint", "massive activations", published),
    ]
    group = []
    for title, name, meaning, rows in tables:
        lines = table(title, name, meaning, left=(name, meaning))
        for row in rows.items():
            lines.add_row(*row)
        group.append(lines)
    return Group(*group)
