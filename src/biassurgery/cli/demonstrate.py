"""`biassurgery demo`: the paper's central result, printed."""

from __future__ import annotations

from biassurgery.cli import options as o
from biassurgery.cli.output import show


def demo(json: o.Json = False) -> None:
    """Show the paper's central result on the packaged model: find, fix, remove."""
    from biassurgery.cli.demo import run_demo

    result = run_demo()
    document = {
        "about": result.about.splitlines(),
        "layers": result.detection.layers,
        "sites": result.detection.sites.header(),
        "results": [{"mode": row.label, **row.values} for row in result.comparison.rows],
    }
    show(json, document, result.about, result.detection, result.comparison)
