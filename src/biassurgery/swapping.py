"""Where version 0.1.0, until its rooms were built, kept what a pickled patched model begins with.

`torch.load` of such a file asks for it here, and is told what to do.
"""

from __future__ import annotations

from typing import NoReturn

from biassurgery.errors import FileError

_BEGINNING = "_new_swapped"


def __getattr__(name: str) -> NoReturn:
    if name != _BEGINNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise FileError(
        "file: it holds a whole model that was pickled (torch.save) while it was patched by an"
        " earlier version of biassurgery, whose classes are no longer there. Load it with that"
        " version, save_patch(model, folder) and unpatch_model(model) there, and save the model;"
        " here, load_patch(model, folder) puts the patch on."
    )
