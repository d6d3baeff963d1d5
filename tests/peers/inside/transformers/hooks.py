"""Where a user of transformers gets a model: built from a config, or from `from_pretrained`.

The outermost one only: a model inside another is not built for its own sake.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from .testers import FAMILIES, Tester

Patch = Callable[[Any], None]


class Outermost:
    """How many constructors of models run inside each other."""

    depth = 0


def install(patch: Patch) -> None:
    for cls in Tester(FAMILIES[os.environ["PEERS_FAMILY"]]).classes():
        cls.__init__ = _patched_when_built(cls.__init__, patch)
    _patch_what_is_loaded(patch)


def role_of(model: Any) -> str:
    return "cls" if model.main_input_name == "pixel_values" else "start"


def _patched_when_built(build: Any, patch: Patch) -> Any:
    @functools.wraps(build)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        Outermost.depth += 1
        try:
            build(self, *args, **kwargs)
        finally:
            Outermost.depth -= 1
        if Outermost.depth == 0:
            patch(self)

    return wrapper


def _patch_what_is_loaded(patch: Patch) -> None:
    load = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        Outermost.depth += 1
        try:
            loaded = load(cls, *args, **kwargs)
        finally:
            Outermost.depth -= 1
        if isinstance(loaded, tuple):  # output_loading_info=True
            patch(loaded[0])
        else:
            patch(loaded)
        return loaded

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
