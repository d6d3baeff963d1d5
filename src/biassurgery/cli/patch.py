"""`biassurgery patch`: a patch as a folder, for `load_patch` and the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from biassurgery.cli import options as o
from biassurgery.cli.inputs import prepare
from biassurgery.cli.output import about, header, show

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write the patch.")]


@o.with_request
def patch(
    request: o.Request,
    folder: Folder,
    given: o.Given,
    mode: o.Modes = None,
    layers: o.LayersOption = "first",
    json: o.Json = False,
) -> None:
    """Write a patch as a folder: set_mean by default. Several modes are one patch, in this order.

    Findings that no file has are measured, on --text or --images if they are given.
    """
    from biassurgery.cli.findings import Findings
    from biassurgery.cli.modes import parse_layers, parse_mode
    from biassurgery.patching import patch_model, patches
    from biassurgery.saving.save import save_patch

    asked = [parse_mode(spec) for spec in mode or ("set_mean",)]
    where = parse_layers(layers)
    findings = Findings(given)
    inputs = prepare(request)
    model = inputs.host.root
    on_data = bool(request.text) or request.images is not None
    sites: Any = None
    if any(one.needs_sites for one in asked):
        sites = findings.get("sites", inputs, on_data)
    modes = [findings.mode(one, inputs, on_data) for one in asked]
    for one in modes:
        patch_model(model, one, sites=sites if one.needs_sites else None, layers=where)
    save_patch(model, folder)
    applied = [
        {"mode": patch.mode.name, "layers": list(patch.layers), "sites": len(patch.sites)}
        for patch in patches(model)
    ]
    document = header(inputs) | {"saved": str(folder), "patches": applied}
    lines = [f"{one['mode']} on layers {', '.join(map(str, one['layers']))}" for one in applied]
    show(json, document, about(inputs), *lines, f"saved to {folder}")
